"""`reapply`: bring a model in training back to where it stood along its safety directions.

With U_k, S_k, V_k of the change that alignment made (paper, section 3), C = U_k^T (W - W_base) V_k says where a matrix
stands within them: C = diag(S_k) for the aligned model, (1 + alpha) diag(S_k) after LoX.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lox_hf.core.precision import exact_products
from lox_hf.edit.tensor import naming
from lox_hf.errors import NumericsError, listing
from lox_hf.subspace import SafetySubspace
from lox_hf.training.backends import LiveWeights
from lox_hf.training.scope import check_fit

ROUNDING = 1e-6
"""Differences below this share of ||S_k||_F are rounding of the float32 products in C, not drift."""


def start_coordinates(weights: LiveWeights, subspace: SafetySubspace) -> dict[str, Tensor]:
    """Return C = U_k^T (W - W_base) V_k of every matrix that the subspace holds.

    Nothing is changed, and no base is read: the subspace knows U_k^T W_base V_k.

    Args:
        weights: The model in training; where it is spread over processes, all of them have to call this.
        subspace: Directions of the aligned model.

    Returns:
        (k, k) float64 on the CPU by matrix name.

    Raises:
        PairingError: If matrices are missing in the model or of another shape; all are listed.
        NumericsError: If a matrix contains NaN or Inf; it is named.

    Example:
        >>> import torch
        >>> from lox_hf import LoxConfig, SafetySubspace
        >>> from lox_hf.training.backends import open_weights
        >>> base, aligned = (torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(2))
        >>> subspace = SafetySubspace.from_models(aligned, base, LoxConfig(r=2))
        >>> found = start_coordinates(open_weights(aligned), subspace)["0.weight"]
        >>> torch.allclose(found, subspace.factors["0.weight"].S.double().diag(), atol=1e-6)
        True
    """
    found = {}
    for name in _held(weights, subspace):
        with naming(name), exact_products():
            found[name] = weights.matrices[name].coordinates(subspace.factors[name]) - subspace.base_coordinates[name]
    return found


def targets(subspace: SafetySubspace, strength: float | None, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return where `reapply` is to bring every matrix.

    Args:
        subspace: Directions of the aligned model.
        strength: s for T = s diag(S_k): 1 is the aligned model, 1 + alpha a hardened one, and a retention of s is what
            is read afterwards. None takes the model's own start, whatever it was.
        start: The model's `start_coordinates`.

    Returns:
        T, (k, k) float64 by matrix name: those of `start`.

    Example:
        >>> import torch
        >>> targets(subspace, 1.25, start)["lm_head.weight"].diag()  # doctest: +SKIP
    """
    if strength is None:
        return dict(start)
    return {name: torch.diag(strength * subspace.factors[name].S.double().cpu()) for name in start}


def off_target(subspace: SafetySubspace, targets: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> list[str]:
    """Return the matrices that `reapply` would change.

    Args:
        subspace: Directions of the aligned model.
        targets: T, (k, k) by matrix name.
        now: C, (k, k) by matrix name.

    Returns:
        Names of those whose T - C is more than rounding.
    """
    factors = subspace.factors
    return [name for name in targets if (targets[name] - now[name]).norm() > ROUNDING * factors[name].S.norm()]


def reapply(weights: LiveWeights, subspace: SafetySubspace, targets: Mapping[str, Tensor]) -> float:
    """Bring every matrix to its target within the directions, in place, and move it nowhere else.

    With T the target and M = T - C: W <- W + U_k M V_k^T, after which C = T up to rounding to the dtype of W. A matrix
    whose M is rounding, as where it is frozen, is not touched and stays bit-identical. Everything is read and checked
    before anything is changed.

    In float32 retention is right to 1e-6 and a second call finds nothing to do. In bfloat16 an entry whose change is
    under half a unit in its last place does not move, so small corrections of large matrices come back in part only:
    of 2048 x 2048 with s_1 = 0.3, a loss of half comes back to 0.998, of a tenth to 0.97, of 0.03 to 0.978. Read
    retention again to know.

    Args:
        weights: The model in training; where it is spread over processes, all of them have to call this.
        subspace: Directions of the aligned model.
        targets: T, (k, k) by matrix name; a matrix without one is left alone.

    Returns:
        Size of what was added, ||M||_F / ||S_k||_F over all matrices that have a target: 1 is as much as alignment's
        own component, 0 is nothing.

    Raises:
        PairingError: If matrices are missing in the model or of another shape; all are listed.
        NumericsError: If a matrix or its target contains NaN or Inf; it is named, and nothing is changed.

    Example:
        >>> import torch
        >>> from lox_hf import LoxConfig, SafetySubspace
        >>> from lox_hf.training.backends import open_weights
        >>> base, aligned = (torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(2))
        >>> subspace = SafetySubspace.from_models(aligned, base, LoxConfig(r=2))
        >>> weights = open_weights(base)  # nothing of the alignment is in here
        >>> goal = targets(subspace, 1.0, start_coordinates(weights, subspace))
        >>> round(reapply(weights, subspace, goal), 4), reapply(weights, subspace, goal)
        (1.0, 0.0)

    Source: Perin et al., COLM 2025, section 3, for U_k, S_k and V_k; the correction is ours.
    """
    now = start_coordinates(weights, subspace)
    missing = {name: target - now[name] for name, target in targets.items()}
    broken = [name for name, m in missing.items() if not m.isfinite().all()]
    if broken:
        raise NumericsError(f"Nothing was re-applied: {len(broken)} targets contain NaN or Inf: {listing(broken)}")
    factors = subspace.factors
    added = {name: missing[name] for name in off_target(subspace, targets, now)}
    with exact_products():
        weights.add({name: (factors[name].U @ m.to(factors[name].U), factors[name].Vh) for name, m in added.items()})
    reference = _norm(factors[name].S for name in missing)
    return _norm(added.values()) / reference if reference > 0 else 0.0


def _norm(parts: Iterable[Tensor]) -> float:
    """||.||_F of all parts together."""
    return math.sqrt(math.fsum(part.double().square().sum().item() for part in parts))


def _held(weights: LiveWeights, subspace: SafetySubspace) -> list[str]:
    """The matrices of the subspace, which the model has to hold; a head that is tied has no weight of its own."""
    check_fit(weights, None, subspace, [name for name, info in weights.infos().items() if len(info.shape) > 1])
    return [name for name in subspace.factors if name in weights.matrices]
