"""Directions on an accelerator: matrices of one shape in batches, the next batch on its way while one is in work."""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lox_hf.core.batched import batch_bytes, batched_lanczos
from lox_hf.core.delta import Delta
from lox_hf.core.lanczos import Triplets
from lox_hf.core.lowrank import Decomposition, LowRank, fits
from lox_hf.edit.tensor import BaseFactors, Directions, FactorSource, matrices
from lox_hf.parallel.device import CPU, memory_budget
from lox_hf.parallel.staging import Stage
from lox_hf.records import TensorPlan
from lox_hf.weights.selection import matrix_shape
from lox_hf.weights.source import DictSource, TensorInfo, WeightSource

STAGED_BATCHES = 2
"""How many batches have their tensors on the device: the one in work, and the one that is coming."""


def find_in_batches(
    plans: Sequence[TensorPlan],
    aligned: WeightSource,
    factors: FactorSource,
    *,
    device: torch.device,
    budget_bytes: int | None = None,
    groups: Mapping[str, int] | None = None,
) -> Generator[tuple[TensorPlan, Tensor, Directions], None, None]:
    """Bring tensors to a device and find their directions there, those of many matrices of one shape at once.

    What is not found in a batch (an energy share, the full rank, an exact SVD, a spectrum that is too hard) is found
    on the device as well, matrix by matrix, when it is asked for. Directions that are not found by decomposing a base,
    as those of a subspace, are passed on.

    Args:
        plans: Tensors that are edited.
        aligned: The aligned tensors; those that are on the device are used where they are.
        factors: Where the directions come from.
        device: Where the work is done; with its index.
        budget_bytes: Memory of the device that may be taken; None takes `memory_budget`.
        groups: Group of each tensor by its name: groups come one after the other.

    Yields:
        Each plan once, batch by batch, with its tensor on the device and its directions; both are for use until the
        next one is asked for.

    Raises:
        LoxError: As reading the tensors and finding the directions would.
    """
    budget = memory_budget(device) if budget_bytes is None else budget_bytes
    loader = _Loader(aligned, factors, Stage(device))
    batches = _cut(plans, factors, aligned, device, budget, groups or {})
    with ThreadPoolExecutor(1, thread_name_prefix="lox-stage") as pool:  # ends with the batch that is being loaded
        coming = [pool.submit(loader.load, batch) for batch in batches[:1]]
        for number in range(len(batches)):
            batch = coming.pop().result()
            coming.extend(pool.submit(loader.load, following) for following in batches[number + 1 : number + 2])
            loader.stage.take_over(batch.arrived, batch.brought())
            yield from _work(batch, loader, budget)
            del batch  # its memory is for the one after the next


def place_of(source: WeightSource, name: str) -> torch.device:
    """Return where a tensor is: files count as host memory.

    Args:
        source: The tensors.
        name: Which one.

    Returns:
        The device.
    """
    return source.get(name).device if isinstance(source, DictSource) else CPU


@dataclass(frozen=True)
class _Batch:
    """Tensors of some plans on the device, of both sides."""

    plans: Sequence[TensorPlan]
    aligned: dict[str, Tensor]
    base: dict[str, Tensor]
    arrived: Any

    def brought(self) -> list[Tensor]:
        return [*self.aligned.values(), *self.base.values()]


class _Loader:
    """Brings batches to the device, in its own thread."""

    def __init__(self, aligned: WeightSource, factors: FactorSource, stage: Stage) -> None:
        self.aligned, self.factors, self.stage = aligned, factors, stage

    def load(self, plans: Sequence[TensorPlan]) -> _Batch:
        for plan in plans:
            self.aligned.prefetch(plan.name)
            self.factors.prefetch(plan.name)
        aligned = {plan.name: self.stage.bring(self.aligned.get(plan.name)) for plan in plans}
        base = {}
        if isinstance(self.factors, BaseFactors):
            with_directions = [plan for plan in plans if plan.r is not None]
            base = {plan.name: self.stage.bring(self.factors.base.get(plan.name)) for plan in with_directions}
        return _Batch(plans, aligned, base, self.stage.ready())

    def release(self, name: str) -> None:
        self.aligned.release(name)
        self.factors.release(name)


class _Found:
    """What was found in a batch; the rest is found from the base on the device when it is asked for."""

    def __init__(
        self, factors: BaseFactors, staged: BaseFactors, known: dict[tuple[str, int], Decomposition]
    ) -> None:
        self._factors, self._staged, self._known = factors, staged, known

    def delta(self, plan: TensorPlan, number: int, aligned: Any) -> Delta:
        """Return dW of one matrix, from the base where it was: an undo may keep it, and must not fill the device."""
        return self._factors.delta(plan, number, aligned)

    def find(self, plan: TensorPlan, number: int, aligned: Any) -> Decomposition:
        """Return the directions of one matrix."""
        known = self._known.get((plan.name, number))
        return self._staged.find(plan, number, aligned) if known is None else known


def _work(batch: _Batch, loader: _Loader, budget: int) -> Iterator[tuple[TensorPlan, Tensor, Directions]]:
    directions: Directions = loader.factors
    if isinstance(loader.factors, BaseFactors):
        source = DictSource(batch.base, loader.factors.base.label)
        staged = BaseFactors(source, loader.factors.config, loader.factors.reference)
        directions = _Found(loader.factors, staged, _find(batch, staged, budget))
    for plan in batch.plans:
        yield plan, batch.aligned[plan.name], directions
        loader.release(plan.name)
    batch.base.clear()  # the consumer holds the directions until it gets others


def _find(batch: _Batch, factors: BaseFactors, budget: int) -> dict[tuple[str, int], Decomposition]:
    """Directions of all matrices of a batch, which have one shape and one r, in parts that the budget holds."""
    first, config = batch.plans[0], factors.config
    k = _batch_rank(first, factors)
    if k is None:
        return {}
    changes = [
        ((plan.name, number), factors.delta(plan, number, matrix))
        for plan in batch.plans
        for number, matrix in enumerate(matrices(batch.aligned[plan.name]))
    ]
    known: dict[tuple[str, int], Decomposition] = {}
    at_once = budget // batch_bytes(matrix_shape(first.shape)[1:], k)  # 0: in tiles, when it is asked for
    for start in range(0, len(changes) if at_once else 0, max(1, at_once)):
        part = changes[start : start + at_once]
        found = batched_lanczos(_stack([delta for _, delta in part]), k, tol=config.svd_tol, seed=config.seed)
        known |= {
            key: _decomposition(triplets)
            for (key, _), triplets in zip(part, found, strict=True)
            if triplets is not None
        }
    return known


def _stack(changes: list[Delta]) -> Tensor:
    """Every dW as a whole, (count, m, n) float32: both sides upcast before they are subtracted, so it is exact."""
    stacked = torch.empty((len(changes), *changes[0].shape), device=changes[0].device, dtype=torch.float32)
    for place, delta in zip(stacked, changes, strict=True):
        place.copy_(delta.aligned).sub_(delta.base_rows(slice(0, len(place))))
    return stacked


def _decomposition(found: Triplets) -> Decomposition:
    factors, method = LowRank(found.u, found.s, found.vh), "lanczos" if found.energy > 0 else "zero"
    return Decomposition(factors, found.energy, found.next_s, found.residual, found.steps, method)


def _batch_rank(plan: TensorPlan, factors: FactorSource) -> int | None:
    """Number of directions where a tensor's matrices are decomposed in batches; None where each is alone."""
    _, rows, columns = matrix_shape(plan.shape)
    if not isinstance(factors, BaseFactors) or not isinstance(plan.r, int):
        return None
    k = min(plan.r, rows, columns)
    return k if fits((rows, columns), k, factors.config.svd) else None


def _cut(
    plans: Sequence[TensorPlan],
    factors: FactorSource,
    aligned: WeightSource,
    device: torch.device,
    budget: int,
    groups: Mapping[str, int],
) -> list[list[TensorPlan]]:
    """Put tensors that are alike together, as many as the budget holds; one that is larger is a batch of its own."""
    sides = [aligned, *([factors.base] if isinstance(factors, BaseFactors) else [])]
    sizes = [(source, source.infos()) for source in sides]

    def need(plan: TensorPlan) -> int:
        count, rows, columns = matrix_shape(plan.shape)
        k = _batch_rank(plan, factors)
        work = 0 if k is None else count * batch_bytes((rows, columns), k)
        staged = sum(_staged_bytes(infos[plan.name]) for side, infos in sizes if place_of(side, plan.name) != device)
        return work + STAGED_BATCHES * staged

    alike: dict[tuple[Any, ...], list[TensorPlan]] = {}
    for plan in plans:
        key = (groups.get(plan.name, 0), matrix_shape(plan.shape)[1:], _batch_rank(plan, factors))
        alike.setdefault(key, []).append(plan)
    return [batch for key in sorted(alike, key=lambda key: key[0]) for batch in _filled(alike[key], need, budget)]


def _staged_bytes(info: TensorInfo) -> int:
    """Memory of a tensor on the device, in the dtype that it is read in."""
    dtype = info.read_as or info.dtype
    return math.prod(info.shape) * (dtype.itemsize if dtype else 1)


def _filled(plans: list[TensorPlan], need: Callable[[TensorPlan], int], budget: int) -> Iterator[list[TensorPlan]]:
    batch: list[TensorPlan] = []
    left = budget
    for plan in plans:
        if batch and need(plan) > left:
            yield batch
            batch, left = [], budget
        batch.append(plan)
        left -= need(plan)
    if batch:
        yield batch
