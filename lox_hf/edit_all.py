"""All tensors of a checkpoint, each once: edited or handed on, whatever takes them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from lox_hf.edit import FactorSource, MatrixSink, edit_tensor
from lox_hf.parallel import map_tensors
from lox_hf.records import TensorPlan, TensorReport
from lox_hf.weights.source import WeightSource


class Target(Protocol):
    """Where the finished tensors go."""

    def sink(self, plan: TensorPlan, aligned: Tensor) -> MatrixSink:
        """Return what takes the finished rows of a tensor that is edited."""
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
        target: Where the finished tensors go; it is called from several threads.
        num_workers: Threads; None takes torch's number of threads.
        progressbar: Show a progress bar; None shows one on a terminal only.
        description: Text beside the bar.
        groups: Group of each tensor by its name: a group begins before the next one does; None takes them as one.
        finished: Called with each tensor that is done, from its thread; an error that it raises ends the work.

    Returns:
        One report per matrix, in the order of the plans.

    Raises:
        NumericsError: If a matrix is not finite, does not converge or overflows; it is named.
    """
    infos = aligned.infos()

    def prepare(plan: TensorPlan) -> None:
        aligned.prefetch(plan.name)
        if plan.edit:
            factors.prefetch(plan.name)

    def work(plan: TensorPlan) -> list[TensorReport]:
        reports: list[TensorReport] = []
        if plan.edit:
            tensor = aligned.get(plan.name)
            reports = edit_tensor(plan, tensor, factors, target.sink(plan, tensor))
            factors.release(plan.name)
        else:
            target.copy(plan)
        aligned.release(plan.name)
        if finished is not None:
            finished(plan, reports)
        return reports

    results = map_tensors(
        work,
        plans,
        size_of=lambda plan: infos[plan.name].size_bytes,
        num_workers=num_workers,
        progressbar=progressbar,
        description=description,
        prepare=prepare,
        group_of=lambda plan: groups[plan.name] if groups else 0,
    )
    return tuple(report for reports in results for report in reports)
