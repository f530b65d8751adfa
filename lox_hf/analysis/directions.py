"""The directions of an analysis: given and checked, or found once and kept in the run's folder."""

import shutil

import torch

from lox_hf.core.geometry import coordinates
from lox_hf.edit.tensor import BaseFactors, matrices, matrix_names
from lox_hf.errors import ConfigError, LoxError, PairingError, listing
from lox_hf.inputs import Pair
from lox_hf.parallel.threads import map_tensors
from lox_hf.records import TensorPlan
from lox_hf.run_folder import RunFolder
from lox_hf.subspace import SafetySubspace
from lox_hf.weights.source import WeightSource

FOLDER_NAME = "subspace"
CLOSE = 0.01
"""How far S may lie from U^T dW V, as a share of it: a decomposition is closer by far, and another model's is not."""


def base_of(pair: Pair) -> WeightSource:
    """Return the weights of the base.

    Args:
        pair: The pair.

    Returns:
        Its tensors by checkpoint name.

    Raises:
        ConfigError: If the pair has directions in place of a base.
    """
    if not isinstance(pair.factors, BaseFactors):
        raise ConfigError(
            "The base model's own weights are needed, and base_model holds directions: pass the base as base_model, "
            "and the directions as subspace."
        )
    return pair.factors.base


def check_same_models(subspace: SafetySubspace, pair: Pair) -> None:
    """Check that directions are those of a pair, by its weights: U^T (W_aligned - W_base) V must be S.

    Args:
        subspace: The directions.
        pair: The two models, and which tensors at which rank.

    Raises:
        PairingError: If it lacks a matrix, holds too few directions of one, or was made from other models.
    """
    subspace.factor_source().check(pair.aligned.source, pair.plans, pair.config)
    aligned, base = pair.aligned.source, base_of(pair)

    def differing(plan: TensorPlan) -> list[str]:
        pairs = zip(matrices(aligned.get(plan.name)), matrices(base.get(plan.name)), strict=True)
        found = [
            name
            for name, (ours, theirs) in zip(matrix_names(plan.name, plan.shape), pairs, strict=True)
            if not _holds(subspace, name, ours, theirs)
        ]
        aligned.release(plan.name)
        base.release(plan.name)
        return found

    edited, sizes = [plan for plan in pair.plans if plan.edit], aligned.infos()
    found = map_tensors(differing, edited, size_of=lambda plan: sizes[plan.name].size_bytes, progressbar=False)
    wrong = [name for names in found for name in names]
    if wrong:
        raise PairingError(
            f"The subspace was made from other models than {aligned.label} and {base.label}: along its directions "
            f"{len(wrong)} matrices differ by something else. {listing(wrong, 5)} Make it from these two."
        )


def find_directions(
    pair: Pair, folder: RunFolder, progressbar: bool | None = None, name: str = FOLDER_NAME
) -> SafetySubspace:
    """Return the directions of a pair; those that an earlier process left in the run's folder are read.

    Args:
        pair: The two models and the settings.
        folder: The open folder of the run; one in memory keeps nothing.
        progressbar: Show a progress bar; None shows it on a terminal only.
        name: Where in the run's folder they are kept.

    Returns:
        The directions.

    Raises:
        PairingError: If no selected matrix differs between the two.
        NumericsError: If a matrix contains NaN or Inf; it is named.
        OutputError: If the folder cannot be written.
    """
    place = None if folder.folder is None else folder.folder / name
    if place is not None and place.exists():
        try:
            kept = SafetySubspace.from_pretrained(place)
            if kept.config == pair.config:
                check_same_models(kept, pair)
                return kept
        except LoxError:
            pass  # damaged, or of other models: made anew
        shutil.rmtree(place, ignore_errors=True)
    found = SafetySubspace.from_pair(pair, progressbar=progressbar)
    if place is not None:
        found.save_pretrained(place)
    return found


def _holds(subspace: SafetySubspace, name: str, aligned: torch.Tensor, base: torch.Tensor) -> bool:
    directions = subspace.factors[name]
    moved = coordinates(aligned, directions) - coordinates(base, directions)
    expected = torch.diag(directions.S.double().cpu())
    return bool((moved - expected).norm() <= CLOSE * expected.norm())
