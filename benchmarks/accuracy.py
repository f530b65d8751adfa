"""How far lox_hf is from the exact result: projectors and stored entries against float64 SVDs.

Run as a child process by `harden.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from measure import serve_job
from pairs import TensorPairs

_SIDES = ((256, 256), (1024, 256), (256, 1024), (1024, 1024), (768, 512))
_QUICK_SIDES = ((256, 256), (512, 256), (256, 512))
# Singular values by index i = 1, 2, ... and rank r; every one has a gap after r, the smallest a ratio of 1.11.
_SPECTRA: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "strong_gap": lambda i, r: torch.where(i <= r, 1.0, 0.05) * i.pow(-0.3),
    "gap_of_1.2": lambda i, r: torch.where(i <= r, 1.2 * r**0.3, (r + 1) ** 0.3) * i.pow(-0.3),
    "power_law": lambda i, r: i.pow(-0.7),
    "geometric": lambda i, r: torch.pow(10.0, (1 - i) / 2),
    "plateau": lambda i, r: torch.where(i <= r, 1.5, 1.0),
    "over_noise": lambda i, r: torch.where(i <= r, 5 * i.pow(-0.4), 0.0),
}


def projector_error(r: int, seed: int, quick: bool) -> dict[str, Any]:
    """Compare the projectors of a `SafetySubspace` with those of float64 SVDs, over shapes and spectra."""
    from lox_hf import LoxConfig, SafetySubspace

    deltas = {}
    for (rows, columns), spectrum in itertools.product(_QUICK_SIDES if quick else _SIDES, _SPECTRA):
        deltas[f"{spectrum}_{rows}x{columns}.weight"] = _matrix(
            rows, columns, spectrum, r, torch.Generator().manual_seed(seed)
        )
    base = {name: torch.zeros_like(delta) for name, delta in deltas.items()}
    subspace = SafetySubspace.from_models(deltas, base, LoxConfig(r=r, seed=seed))
    cases = [_compare_projectors(name, delta, subspace.factors[name], r) for name, delta in deltas.items()]
    return {"cases": cases, "max_error": max(case["error"] for case in cases)}


def entry_errors(aligned: str, base: str, hardened: str, r: int, alpha: float) -> dict[str, Any]:
    """Compare every stored entry with the exact float64 result, rounded once to the stored dtype."""
    differences = Differences()
    with TensorPairs(aligned, base) as inputs, TensorPairs(hardened, aligned) as outputs:
        matrices = inputs.matrices()
        for name in inputs.names():
            after, before = inputs.read(name)
            exact = _exact_result(after, before, r, alpha) if name in matrices else after
            differences.add(outputs.read(name)[0], exact, after)
    return differences.summary()


def folder_difference(first: str, second: str, aligned: str) -> dict[str, Any]:
    """Compare two hardened folders of the same aligned checkpoint entry by entry."""
    differences = Differences()
    with TensorPairs(first, second) as pairs, TensorPairs(aligned, first) as inputs:
        for name in pairs.names():
            differences.add(*pairs.read(name), inputs.read(name)[0])
    return differences.summary()


class Differences:
    """Count the entries in which two bfloat16 results differ, and by how much.

    One ulp is the spacing of bfloat16 at the larger of the aligned weight and the result. At the result alone it would
    say nothing where the two terms of the sum cancel: a result of 1e-8 out of terms of 1e-4 is thousands of bfloat16
    values off even for a full SVD in float32. Those entries are counted apart, as `neighbours_exceeded`.
    """

    def __init__(self) -> None:
        self._total = self._differing = self._exceeded = 0
        self._max_ulps = 0.0

    def add(self, result: torch.Tensor, exact: torch.Tensor, aligned: torch.Tensor) -> None:
        """Compare one tensor."""
        steps = (_ordered(result) - _ordered(exact)).abs()
        differ = steps > 0
        self._total += steps.numel()
        self._differing += int(differ.sum())
        self._exceeded += int((steps > 1).sum())
        result, exact, aligned = (values[differ].double() for values in (result, exact, aligned))
        spacing = torch.exp2(torch.floor(torch.log2(torch.maximum(exact.abs(), aligned.abs()))) - 7)
        if spacing.numel():
            self._max_ulps = max(self._max_ulps, ((result - exact).abs() / spacing).max().item())

    def summary(self) -> dict[str, Any]:
        """Return the counts as plain data."""
        return {
            "entries": self._total,
            "differing_entries": self._differing,
            "differing_share": self._differing / self._total,
            "max_ulps": self._max_ulps,
            "neighbours_exceeded": self._exceeded,
        }


def _matrix(rows: int, columns: int, spectrum: str, r: int, generator: torch.Generator) -> torch.Tensor:
    """Return a float32 delta with a spectrum that has a gap after direction r."""
    side = min(rows, columns)
    values = _SPECTRA[spectrum](torch.arange(1, side + 1, dtype=torch.float64), r)
    left, _ = torch.linalg.qr(torch.randn(rows, side, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, side, generator=generator, dtype=torch.float64))
    delta = (left * values) @ right.T
    if spectrum == "over_noise":
        noise = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        delta += noise / (math.sqrt(rows) + math.sqrt(columns))
    return (0.01 * delta).float()


def _compare_projectors(name: str, delta: torch.Tensor, factors: Any, r: int) -> dict[str, Any]:
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    errors = {
        "left": _projector_distance(factors.U.double(), left[:, :r]),
        "right": _projector_distance(factors.Vh.double().mT, right[:r].mT),
    }
    ratio = (values[r - 1] / values[r]).item()
    return {"matrix": name, "gap_ratio": ratio, **errors, "error": max(errors.values())}


def _projector_distance(basis: torch.Tensor, exact: torch.Tensor) -> float:
    """Return ||B B^T - E E^T||_2, computed inside the span of both bases."""
    frame, _ = torch.linalg.qr(torch.cat((exact, basis), dim=1))
    ours, theirs = frame.mT @ basis, frame.mT @ exact
    return torch.linalg.matrix_norm(ours @ ours.mT - theirs @ theirs.mT, ord=2).item()


def _exact_result(after: torch.Tensor, before: torch.Tensor, r: int, alpha: float) -> torch.Tensor:
    """Return aligned + alpha * rank-r part of the delta in float64, rounded once to bfloat16."""
    weights = after.double()
    left, values, right = torch.linalg.svd(weights - before.double(), full_matrices=False)
    exact = weights + alpha * (left[:, :r] * values[:r]) @ right[:r]
    return _round_once(exact)


def _round_once(exact: torch.Tensor) -> torch.Tensor:
    """Round float64 to bfloat16 in one step.

    Torch goes through float32. That is wrong only where float32 lands exactly halfway between two bfloat16 values:
    there the float32 value is moved one step back to the side on which the float64 value lies.
    """
    near = exact.float()
    halfway = (near.view(torch.int32) & 0xFFFF) == 0x8000
    side = torch.sign(exact - near.double()).float() * math.inf
    moved = torch.where(halfway & (near.double() != exact), torch.nextafter(near, side), near)
    return moved.bfloat16()


def _ordered(values: torch.Tensor) -> torch.Tensor:
    """Map bfloat16 to integers in the same order, neighbours one apart and both zeros at 0."""
    bits = values.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


if __name__ == "__main__":
    serve_job({"projectors": projector_error, "entries": entry_errors, "folders": folder_difference})
