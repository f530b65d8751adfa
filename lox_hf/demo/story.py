"""The whole demonstration: train the pair, harden it three ways, check that they agree, measure what changed."""

import math
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from torch import nn

from lox_hf.adapter import get_lox_model
from lox_hf.apply import apply_lox
from lox_hf.config import LoxConfig
from lox_hf.demo.measure import Scores, score
from lox_hf.demo.pair import QUESTIONS_NAME, discard, load, quiet_transformers, trained_pair
from lox_hf.demo.training import Progress, Recipe, one_thread
from lox_hf.errors import LoxError
from lox_hf.harden import harden_checkpoint
from lox_hf.records import JsonRecord

R = 2
ALPHAS = (0.5, 1.0)
"""Strengths that are shown. The paper's 1.25 and more breaks the small models' answers."""
AGREEMENT = 1e-6
"""Largest difference between two routes. Weights are below 4, where float32 is spaced by 2.4e-7, and a merge rounds a
few times on the way."""
CAVEAT = (
    "This is a toy: 0.4 M parameters, an invented world, one seed. It shows that hardening keeps what the model does "
    "before any attack, and what too large an alpha costs; robustness is not measured here. LoX delays the loss of "
    "refusals in fine-tuning, it does not prevent it, and how much it delays varies a lot from seed to seed."
)


@dataclass(frozen=True)
class ModelResult(JsonRecord):
    """One row of the table.

    Attributes:
        name: "base", "aligned", or "hardened" with its alpha.
        folder: Its checkpoint.
        scores: What it answered.
    """

    name: str
    folder: str
    scores: Scores

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record with its scores."""
        return super().from_dict({**data, "scores": Scores.from_dict(data["scores"])})


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


@dataclass(frozen=True)
class DemoReport(JsonRecord):
    """What the demonstration did and found.

    Attributes:
        seed: Seed of the pair.
        r: Directions in each matrix that were extrapolated.
        folder: Where everything is.
        results: Base, aligned, and hardened at each strength.
        agreements: How far the three routes are apart, at each strength.
        questions: The held-out questions as a prompt set, a file.
        seconds: Wall time, in seconds.
        caveat: What these numbers do not say.
    """

    seed: int
    r: int
    folder: str
    results: tuple[ModelResult, ...]
    agreements: tuple[Agreement, ...]
    questions: str
    seconds: float
    caveat: str = CAVEAT

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the report with its nested records."""
        results = tuple(ModelResult.from_dict(item) for item in data["results"])
        agreements = tuple(Agreement.from_dict(item) for item in data["agreements"])
        return super().from_dict({**data, "results": results, "agreements": agreements})


def tell_story(
    output_dir: str | Path, seed: int = 0, recipe: Recipe | None = None, progress: Progress | None = None
) -> DemoReport:
    """Train a small pair, harden it on disk, in memory and as an adapter, and measure all models before any attack.

    About a minute on one core; the trained pair stays in the output folder and is used again.

    Args:
        output_dir: Folder that keeps the pairs of all seeds; this one's checkpoints go to `seed-N` in it.
        seed: Seed of the pair.
        recipe: How the pair is trained; None takes the defaults, to which the demonstration's numbers belong.
        progress: Called after every training step.

    Returns:
        The numbers and where the checkpoints are.

    Raises:
        LoxError: If peft is not installed.
        OutputError: If the folder holds something else, or cannot be written.

    Example:
        >>> report = tell_story("lox-demo")  # doctest: +SKIP
        >>> report.results[1].name, report.results[1].scores.refusals.share  # doctest: +SKIP
        ('aligned', 1.0)
    """
    if find_spec("peft") is None:
        raise LoxError("The demonstration shows the adapter as well and needs peft: pip install 'lox-hf[peft]'.")
    started = time.perf_counter()
    base, aligned = trained_pair(seed, output_dir, recipe, progress)
    results = [_measure("base", base), _measure("aligned", aligned)]
    agreements = []
    for alpha in ALPHAS:
        hardened = aligned.parent / f"hardened-alpha-{alpha:g}"
        agreements.append(_harden_three_ways(base, aligned, hardened, alpha))
        results.append(_measure(f"hardened alpha {alpha:g}", hardened))
    seconds = time.perf_counter() - started
    questions = str(aligned.parent / QUESTIONS_NAME)
    return DemoReport(seed, R, str(aligned.parent), tuple(results), tuple(agreements), questions, seconds)


def _harden_three_ways(base: Path, aligned: Path, hardened: Path, alpha: float) -> Agreement:
    """Write the hardened checkpoint, make the same model in memory and as an adapter, and compare all weights."""
    config = LoxConfig(base_model_name_or_path=str(base), r=R, alpha=alpha)
    discard(hardened)
    harden_checkpoint(aligned, hardened, config, progressbar=False)
    on_disk = load(hardened)[0]
    in_memory = apply_lox(load(aligned)[0], config, progressbar=False)
    with quiet_transformers():
        merged = get_lox_model(load(aligned)[0], config, progressbar=False).merge_and_unload()
    memory_difference = _largest_difference(on_disk, in_memory)
    adapter_difference = _largest_difference(on_disk, merged)
    return Agreement(
        alpha=alpha,
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


def _measure(name: str, folder: Path) -> ModelResult:
    model, tokenizer = load(folder)
    with one_thread():
        return ModelResult(name, str(folder), score(model, tokenizer))
