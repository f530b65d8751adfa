"""All tensors of a model, each once, wherever the work is done: of files that are written, and of one in memory."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from lox_hf.core.precision import working_on
from lox_hf.edit.batches import find_in_batches, place_of
from lox_hf.edit.tensor import BaseFactors, Directions, FactorSource, MatrixSink, edit_tensor
from lox_hf.errors import UnsupportedModelError
from lox_hf.parallel.device import CPU, has_float64, in_batches
from lox_hf.parallel.staging import Drain
from lox_hf.parallel.threads import map_tensors
from lox_hf.progress import progress_bar
from lox_hf.records import TensorPlan, TensorReport
from lox_hf.weights.source import WeightSource

TensorWork = Callable[[TensorPlan, Tensor, Directions], None]
"""Takes a tensor where the work is done, and its directions."""


class Target(Protocol):
    """Where the finished tensors go."""

    def sink(self, plan: TensorPlan, aligned: Tensor) -> MatrixSink:
        """Return what takes the finished rows, on the CPU, of a tensor that is edited, which may be on a device."""
        ...

    def copy(self, plan: TensorPlan) -> None:
        """Take a tensor that is not edited."""
        ...


def edit_tensors(
    plans: Sequence[TensorPlan],
    aligned: WeightSource,
    factors: FactorSource,
    target: Target,
    *,
    device: torch.device = CPU,
    num_workers: int | None = None,
    progressbar: bool | None = None,
    description: str = "Hardening",
    groups: Mapping[str, int] | None = None,
    finished: Callable[[TensorPlan, list[TensorReport]], None] | None = None,
) -> tuple[TensorReport, ...]:
    """Extrapolate every tensor that is to be edited, hand on the others, and release each when it is done.

    Args:
        plans: What to do.
        aligned: The aligned tensors.
        factors: Where the directions come from.
        target: Where the finished tensors go; it is called from several threads, for one tensor from one.
        device: Where the work is done; see `resolve_device`.
        num_workers: Threads on the CPU; None takes torch's number of threads.
        progressbar: Show a progress bar; None shows one on a terminal only.
        description: Text beside the bar.
        groups: Group of each tensor by its name: a group begins before the next one does; None takes them as one.
        finished: Called with each tensor that is done, from its thread; an error that it raises ends the work.

    Returns:
        One report per matrix, in the order of the plans.

    Raises:
        NumericsError: If a matrix is not finite, does not converge or overflows; it is named.
    """
    infos, groups = aligned.infos(), groups or {}
    reports: dict[str, list[TensorReport]] = {}

    def done(plan: TensorPlan, found: list[TensorReport]) -> None:
        if finished is not None:
            finished(plan, found)
        reports[plan.name] = found

    if in_batches(device):
        with progress_bar(_bytes(plans, aligned), progressbar, description, unit="B") as advance:
            _edit_on(device, plans, aligned, factors, target, groups, done, advance)
        return tuple(report for plan in plans for report in reports[plan.name])

    def work(plan: TensorPlan) -> None:
        found: list[TensorReport] = []
        if plan.edit:
            tensor = aligned.get(plan.name)
            found = edit_tensor(plan, tensor, factors, target.sink(plan, tensor))
            factors.release(plan.name)
        else:
            target.copy(plan)
        aligned.release(plan.name)
        done(plan, found)

    map_tensors(
        work,
        plans,
        size_of=lambda plan: infos[plan.name].size_bytes,
        num_workers=num_workers,
        progressbar=progressbar,
        description=description,
        prepare=partial(_prefetch, aligned, factors),
        group_of=lambda plan: groups.get(plan.name, 0),
    )
    return tuple(report for plan in plans for report in reports[plan.name])


def each_tensor(
    work: TensorWork,
    plans: Sequence[TensorPlan],
    aligned: WeightSource,
    factors: FactorSource,
    *,
    device: torch.device | None = None,
    progressbar: bool | None = None,
    description: str = "",
) -> None:
    """Do something with every tensor that is edited and its directions: on accelerators one by one, else in threads.

    Args:
        work: What to do.
        plans: Tensors that are edited.
        aligned: The aligned tensors.
        factors: Where the directions come from.
        device: Where the work is done; None works on each tensor where it is.
        progressbar: Show a progress bar; None shows one on a terminal only.
        description: Text beside the bar.

    Raises:
        UnsupportedModelError: If a tensor is on a device without float64, and is to be decomposed there.
        LoxError: The first error of `work`, and of finding the directions.
    """
    places: dict[torch.device, list[TensorPlan]] = {}
    for plan in plans:
        places.setdefault(device or place_of(aligned, plan.name), []).append(plan)
    for place in places:
        if isinstance(factors, BaseFactors) and not has_float64(place):
            raise UnsupportedModelError(
                f"{aligned.label} is on {place}, which has no float64, and the decomposition needs it: move the model "
                'to the CPU for that, with model.to("cpu"), and back afterwards.'
            )
    for place, here in places.items():
        if in_batches(place):
            with progress_bar(_bytes(here, aligned), progressbar, description, unit="B") as advance:
                _each_on(place, work, here, aligned, factors, advance)
        else:
            _each_in_threads(place, work, here, aligned, factors, progressbar, description)


def _each_on(
    device: torch.device,
    work: TensorWork,
    plans: Sequence[TensorPlan],
    aligned: WeightSource,
    factors: FactorSource,
    advance: Callable[[int], object],
) -> None:
    infos = aligned.infos()
    with working_on(device), closing(find_in_batches(plans, aligned, factors, device=device)) as found:
        for plan, tensor, directions in found:
            work(plan, tensor, directions)
            advance(infos[plan.name].size_bytes)


def _each_in_threads(
    device: torch.device,
    work: TensorWork,
    plans: Sequence[TensorPlan],
    aligned: WeightSource,
    factors: FactorSource,
    progressbar: bool | None,
    description: str,
) -> None:
    infos = aligned.infos()

    def run(plan: TensorPlan) -> None:
        work(plan, aligned.get(plan.name).to(device), factors)
        aligned.release(plan.name)
        factors.release(plan.name)

    map_tensors(
        run,
        plans,
        size_of=lambda plan: infos[plan.name].size_bytes,
        progressbar=progressbar,
        description=description,
        prepare=partial(_prefetch, aligned, factors),
    )


def _edit_on(
    device: torch.device,
    plans: Sequence[TensorPlan],
    aligned: WeightSource,
    factors: FactorSource,
    target: Target,
    groups: Mapping[str, int],
    done: Callable[[TensorPlan, list[TensorReport]], None],
    advance: Callable[[int], object],
) -> None:
    """Edit on an accelerator; what is written, copied and reported is so in the drain's thread, in that order."""
    infos = aligned.infos()
    copies = sorted((plan for plan in plans if not plan.edit), key=lambda plan: -groups.get(plan.name, 0))
    edited = [plan for plan in plans if plan.edit]

    def end(plan: TensorPlan, reports: list[TensorReport]) -> None:
        done(plan, reports)
        advance(infos[plan.name].size_bytes)

    def copy(plan: TensorPlan) -> None:
        target.copy(plan)
        aligned.release(plan.name)
        end(plan, [])

    def edit(plan: TensorPlan, tensor: Tensor, directions: Directions) -> None:
        sink = target.sink(plan, tensor)
        reports = edit_tensor(
            plan, tensor, directions, lambda number, part, tile: drain.rows(part, tile, partial(sink, number))
        )
        drain.then(partial(end, plan, reports))

    with (
        working_on(device),
        Drain(device) as drain,
        closing(find_in_batches(edited, aligned, factors, device=device, groups=groups)) as found,
    ):
        for plan, tensor, directions in found:
            while copies and groups.get(copies[-1].name, 0) <= groups.get(plan.name, 0):
                drain.then(partial(copy, copies.pop()))
            edit(plan, tensor, directions)
        for plan in reversed(copies):
            drain.then(partial(copy, plan))


def _prefetch(aligned: WeightSource, factors: FactorSource, plan: TensorPlan) -> None:
    aligned.prefetch(plan.name)
    if plan.edit:
        factors.prefetch(plan.name)


def _bytes(plans: Sequence[TensorPlan], aligned: WeightSource) -> int:
    infos = aligned.infos()
    return sum(infos[plan.name].size_bytes for plan in plans)
