"""Three ways to one hardened model, and how far they are apart."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from lox_hf.adapter import get_lox_model
from lox_hf.apply import apply_lox
from lox_hf.config import LoxConfig
from lox_hf.demo.pair import discard, load
from lox_hf.evaluation.models.loading import quiet_transformers
from lox_hf.harden import harden_checkpoint
from lox_hf.records import JsonRecord

AGREEMENT = 1e-6
"""Largest difference between two routes. Weights are below 4, where float32 is spaced by 2.4e-7, and a merge rounds a
few times on the way."""


@dataclass(frozen=True)
class Agreement(JsonRecord):
    """How far the three routes to one hardened model are apart.

    Attributes:
        alpha: Strength of the hardening.
        largest_edit: max |W_hardened - W_aligned| over all weights, for comparison.
        memory_difference: max |difference| between `harden_checkpoint` and `apply_lox`.
        adapter_difference: max |difference| between `harden_checkpoint` and `get_lox_model`, merged.
        within: Whether both differences are at most `AGREEMENT`.
    """

    alpha: float
    largest_edit: float
    memory_difference: float
    adapter_difference: float
    within: bool


def harden_three_ways(base: Path, aligned: Path, hardened: Path, config: LoxConfig) -> Agreement:
    """Write the hardened checkpoint, make the same model in memory and as an adapter, and compare all weights.

    Args:
        base: The model before alignment.
        aligned: The aligned model.
        hardened: Folder of the hardened one; what is there goes.
        config: Settings.

    Returns:
        How far the three are apart.
    """
    config = replace(config, base_model_name_or_path=str(base))
    discard(hardened)
    harden_checkpoint(aligned, hardened, config, progressbar=False)
    on_disk = load(hardened)[0]
    in_memory = apply_lox(load(aligned)[0], config, progressbar=False)
    with quiet_transformers():
        merged = get_lox_model(load(aligned)[0], config, progressbar=False).merge_and_unload()
    memory_difference = _largest_difference(on_disk, in_memory)
    adapter_difference = _largest_difference(on_disk, merged)
    return Agreement(
        alpha=config.alpha,
        largest_edit=_largest_difference(on_disk, load(aligned)[0]),
        memory_difference=memory_difference,
        adapter_difference=adapter_difference,
        within=max(memory_difference, adapter_difference) <= AGREEMENT,
    )


def _largest_difference(one: nn.Module, other: nn.Module) -> float:
    """Return max |W - W'| over all weights of two models with the same names."""
    ours, theirs = one.state_dict(), other.state_dict()
    # A name that one side lacks is an endless difference, not a crash or an agreement.
    if ours.keys() != theirs.keys():
        return math.inf
    return max((weight - theirs[name]).abs().max().item() for name, weight in ours.items())
