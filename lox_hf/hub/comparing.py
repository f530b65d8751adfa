"""Published tensors against recomputed ones, bit for bit, and what rounding explains where they differ.

Hardening gives the same bits on the same processor with any number of threads. With other instructions sums are
rounded in another order: in bfloat16 and float16, 4e-4 of a matrix's entries at most were another neighbour, none
further; in float32, where the decomposition's own tolerance is wider than a spacing, half of them, by 2.4e-5 of the
change in norm and 4.2e-5 at the largest.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lox_hf.edit.tensor import MatrixSink, matrices
from lox_hf.records import TensorCheck, TensorPlan
from lox_hf.weights.source import ShardedSource, TensorInfo

ROUNDED_SHARE = 0.01
"""At most this share of the numbers that LoX changes may lie one spacing off in half precision: 25 times what was
seen. It is no share of the whole tensor: where alignment changed little, that would be the whole change."""

ROUNDED_ULPS = 1.0

WIDEST_TOL = 1e-3
"""A published model states its own `svd_tol`: none widens the tolerance in float32 beyond ten times the default."""


class Comparison:
    """A target that keeps nothing: every finished row is compared with the published one.

    Args:
        aligned: The aligned tensors.
        published: The published tensors.
        svd_tol: Tolerance of the decomposition, by which float32 is judged.
    """

    def __init__(self, aligned: ShardedSource, published: ShardedSource, svd_tol: float) -> None:
        self._aligned, self._published, self._svd_tol = aligned, published, min(svd_tol, WIDEST_TOL)
        self._tallies: dict[str, _Tally] = {}
        self._copied: dict[str, TensorCheck] = {}

    def sink(self, plan: TensorPlan, aligned: Tensor) -> MatrixSink:
        """Return what compares the finished rows of a tensor."""
        before, found = matrices(aligned), matrices(self._published.get(plan.name).view(aligned.shape))
        tally = self._tallies[plan.name] = _Tally(aligned)

        def compare(number: int, part: slice, tile: Tensor) -> None:
            tally.add(before[number][part], tile, found[number][part])

        return compare

    def copy(self, plan: TensorPlan) -> None:
        """Compare the bytes of a tensor that is not edited."""
        ours, theirs = (
            torch.frombuffer(raw, dtype=torch.uint8) if (raw := source.raw(plan.name)) else torch.empty(0)
            for source in (self._aligned, self._published)
        )
        entries = math.prod(plan.shape)
        differing = 0 if torch.equal(ours, theirs) else int((ours != theirs).view(entries, -1).any(1).sum())
        verdict = "different" if differing else "exact"
        self._copied[plan.name] = TensorCheck(plan.name, verdict, False, entries, differing)

    def check(self, plan: TensorPlan) -> TensorCheck:
        """Judge a tensor after all its rows were compared."""
        if plan.name in self._copied:
            return self._copied[plan.name]
        return self._tallies[plan.name].check(plan.name, self._svd_tol)


class BothSources(ShardedSource):
    """The aligned tensors, with the published ones fetched and let go of together with them."""

    def __init__(self, aligned: ShardedSource, published: ShardedSource) -> None:
        super().__init__(aligned.shards, aligned.label)
        self._aligned, self._published = aligned, published

    def get(self, name: str) -> Tensor:
        """Return the aligned tensor."""
        return self._aligned.get(name)

    def prefetch(self, name: str) -> None:
        """Have both on their way."""
        self._aligned.prefetch(name)
        self._published.prefetch(name)

    def release(self, name: str) -> None:
        """Let go of both."""
        self._aligned.release(name)
        self._published.release(name)


class _Tally:
    """What is counted over the tiles of one edited tensor."""

    def __init__(self, like: Tensor) -> None:
        self.dtype, self.entries = like.dtype, like.numel()
        self.changed, self.differing, self.largest_ulps = 0, 0, 0.0
        self.largest_error, self.largest_change = 0.0, 0.0
        self.error_energy, self.change_energy = 0.0, 0.0

    def add(self, aligned: Tensor, expected: Tensor, found: Tensor) -> None:
        """Count one tile; bits are compared, so that -0.0 is not 0.0 and NaN is NaN."""
        change = expected.to(torch.float32, copy=True).sub_(aligned.float())
        self.change_energy += torch.linalg.vector_norm(change).double().square().item()
        self.largest_change = max(self.largest_change, change.abs_().max().item())
        self.changed += int(torch.count_nonzero(change))
        del change
        integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}[self.dtype.itemsize]
        other = expected.view(integers) != found.contiguous().view(integers)
        if not other.any():
            return
        self.differing += int(other.sum())
        ours, theirs, before = (tensor[other].double() for tensor in (expected, found, aligned))
        error = (theirs - ours).abs().nan_to_num(nan=math.inf)
        limits = torch.finfo(self.dtype)
        size = torch.maximum(before.abs(), ours.abs()).clamp_min(limits.smallest_normal)
        ulps = error / (limits.eps * torch.exp2(torch.floor(torch.log2(size))))
        self.largest_ulps = max(self.largest_ulps, ulps.max().item())
        self.largest_error = max(self.largest_error, error.max().item())
        self.error_energy += error.square().sum().item()

    def check(self, name: str, svd_tol: float) -> TensorCheck:
        """Judge the whole tensor."""
        change, error = math.sqrt(self.change_energy), math.sqrt(self.error_energy)
        return TensorCheck(
            name=name,
            verdict="exact" if not self.differing else "rounding" if self._is_rounding(svd_tol) else "different",
            edited=True,
            entries=self.entries,
            differing=self.differing,
            largest_ulps=self.largest_ulps,
            relative_error=error / change if change else math.inf if error else 0.0,
        )

    def _is_rounding(self, svd_tol: float) -> bool:
        if self.dtype == torch.float32:
            within = self.error_energy <= svd_tol**2 * self.change_energy
            return within and self.largest_error <= svd_tol * self.largest_change
        few = self.differing <= max(1, ROUNDED_SHARE * self.changed)
        return few and self.largest_ulps <= ROUNDED_ULPS


def misfits(
    plans: list[TensorPlan],
    expected: Mapping[str, TensorInfo],
    found: Mapping[str, TensorInfo],
    scales: Mapping[str, str],
) -> dict[str, TensorCheck]:
    """Find the tensors that are missing, extra, or of another shape or dtype, and what cannot be read without them.

    Args:
        plans: What is done to each tensor of the aligned model.
        expected: The aligned model's tensors.
        found: The published ones.
        scales: Name of the scales of each weight that has some: neither says anything without the other.

    Returns:
        Checks by name.
    """
    wrong: dict[str, TensorCheck] = {}
    for plan in plans:
        ours, theirs = expected[plan.name], found.get(plan.name)
        if theirs is None:
            wrong[plan.name] = TensorCheck(plan.name, "different", plan.edit, detail="missing")
        elif (ours.shape, ours.stored) != (theirs.shape, theirs.stored):
            detail = f"{theirs.stored} of shape {theirs.shape}, expected {ours.stored} of shape {ours.shape}"
            wrong[plan.name] = TensorCheck(plan.name, "different", plan.edit, detail=detail)
    edited = {plan.name: plan.edit for plan in plans}
    for weight, scale in scales.items():
        for name, other in ((weight, scale), (scale, weight)):
            if other in wrong and name not in wrong:
                why = f"stands for nothing without {other}, which differs"
                wrong[name] = TensorCheck(name, "different", edited[name], detail=why)
    extra = {
        name: TensorCheck(name, "different", False, detail="not in the aligned model")
        for name in found
        if name not in expected
    }
    return wrong | extra
