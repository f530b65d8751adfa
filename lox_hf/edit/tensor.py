"""One tensor: its matrices, where their directions come from, the extrapolation, and the report."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from lox_hf.config import LoxConfig
from lox_hf.core.delta import Delta
from lox_hf.core.extrapolate import FullPart, LowRankPart, extrapolate
from lox_hf.core.lowrank import Decomposition, LowRank, decompose
from lox_hf.errors import ConfigError, NumericsError, PairingError, listing
from lox_hf.records import ModelReference, TensorPlan, TensorReport
from lox_hf.weights.identity import weights_identity
from lox_hf.weights.pairing import check_pairs
from lox_hf.weights.scaled import coarse_steps
from lox_hf.weights.selection import matrix_shape
from lox_hf.weights.source import WeightSource

NEAR_TIE = 1e-2

MatrixSink = Callable[[int, slice, Tensor], None]
"""Takes finished rows of one matrix of a tensor: matrix number, slice of rows, and the tile in the stored dtype."""


class Piece(Protocol):
    """A matrix that is spread over processes, or a rectangle of one: it knows which part of a base is its own."""

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        ...

    def delta(self, base: Tensor, *, cast_base: bool) -> Delta:
        """Return dW, given the whole of the base."""
        ...


class Directions(Protocol):
    """The directions of each matrix."""

    def delta(self, plan: TensorPlan, number: int, aligned: Tensor | Piece) -> Delta:
        """Return dW of one matrix, for the full-rank form."""
        ...

    def find(self, plan: TensorPlan, number: int, aligned: Tensor | Piece) -> Decomposition:
        """Return the directions of one matrix."""
        ...


class FactorSource(Directions, Protocol):
    """Where directions come from: a base model that is decomposed, or a saved subspace."""

    reference: ModelReference | None

    def check(self, aligned: WeightSource, plans: list[TensorPlan], config: LoxConfig) -> None:
        """Raise with all mismatches when this does not fit the aligned model."""
        ...

    def prefetch(self, name: str) -> None:
        """Hint that a tensor is needed soon."""
        ...

    def release(self, name: str) -> None:
        """Hint that a tensor is not needed any more."""
        ...

    def identity(self) -> str:
        """Return hex digits that tell these directions, or the base they come from, from others."""
        ...


class BaseFactors:
    """Directions found by decomposing the difference to a base model, tensor by tensor.

    Args:
        base: The model before alignment.
        config: How to decompose.
        reference: What the base is called in reports.
    """

    def __init__(self, base: WeightSource, config: LoxConfig, reference: ModelReference | None) -> None:
        self.base, self.config, self.reference = base, config, reference

    def check(self, aligned: WeightSource, plans: list[TensorPlan], config: LoxConfig) -> None:
        """Raise `PairingError` with all mismatches."""
        check_pairs(aligned, self.base, plans, config)

    def prefetch(self, name: str) -> None:
        """Have the base's pages read ahead."""
        self.base.prefetch(name)

    def release(self, name: str) -> None:
        """Let go of the base's pages."""
        self.base.release(name)

    def identity(self) -> str:
        """Identity of the base."""
        return weights_identity(self.base)

    def delta(self, plan: TensorPlan, number: int, aligned: Tensor | Piece) -> Delta:
        """Return dW of one matrix."""
        base = matrices(self.base.get(plan.name))[number]
        if isinstance(aligned, Tensor):
            return Delta(aligned, base, cast_base=self.config.cast_base)
        return aligned.delta(base, cast_base=self.config.cast_base)

    def find(self, plan: TensorPlan, number: int, aligned: Tensor | Piece) -> Decomposition:
        """Decompose dW of one matrix."""
        config = self.config
        if plan.r is None:
            raise ConfigError(f"{plan.name}: the full rank (r=None) has no directions to find.")
        return decompose(
            self.delta(plan, number, aligned), plan.r, svd=config.svd, tol=config.svd_tol, seed=config.seed
        )


def is_stack(shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a stack of matrices, as fused experts are stored."""
    return len(shape) == 3 and matrix_shape(shape) == shape


def matrices(tensor: Tensor) -> list[Tensor]:
    """Views of the matrices a tensor is read as; see `matrix_shape`."""
    shape = tuple(tensor.shape)
    return list(tensor) if is_stack(shape) else [tensor.view(matrix_shape(shape)[1:])]


def matrix_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """Names of the matrices of a tensor: the tensor's own, or `name[i]` in a stack."""
    return [f"{name}[{number}]" for number in range(shape[0])] if is_stack(shape) else [name]


def edit_tensor(plan: TensorPlan, aligned: Tensor, factors: Directions, sink: MatrixSink) -> list[TensorReport]:
    """Extrapolate every matrix of one tensor and hand the rows to `sink`.

    Args:
        plan: What to do.
        aligned: The aligned tensor; read only, unless the sink writes back into it.
        factors: Where the directions come from.
        sink: Receives the finished rows.

    Returns:
        One report per matrix.

    Raises:
        NumericsError: If a matrix is not finite, does not converge or overflows; it is named.
    """
    reports = []
    for number, (name, matrix) in enumerate(zip(matrix_names(plan.name, plan.shape), matrices(aligned), strict=True)):
        started = time.perf_counter()
        with naming(name):
            found = _edit_matrix(plan, matrix, number, factors, sink)
        reports.append(tensor_report(name, plan, found, time.perf_counter() - started))
    return reports


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the matrix's name in front of a numerical error."""
    try:
        yield
    except NumericsError as error:
        raise NumericsError(f"{name}: {error}.") from error


def tensor_report(name: str, plan: TensorPlan, found: Decomposition, seconds: float) -> TensorReport:
    """Report of one matrix.

    Args:
        name: Name of the matrix.
        plan: What was done.
        found: The directions that were used.
        seconds: Wall time.

    Returns:
        The report.
    """
    full = found.method == "full"
    return TensorReport(
        name=name,
        shape=found.factors.shape,
        dtype=plan.dtype,
        alpha=plan.alpha,
        rank=min(found.factors.shape) if full else found.factors.rank,
        method=found.method,
        energy_share=1.0 if full else found.energy_share,
        delta_norm=math.sqrt(found.energy),
        singular_values=tuple(found.singular_values.tolist()),
        residual=found.residual,
        gap=found.gap,
        projector_bound=found.projector_bound if found.factors.rank else math.nan,
        steps=found.steps,
        seconds=seconds,
    )


def report_warnings(reports: Iterable[TensorReport], plans: Sequence[TensorPlan]) -> tuple[str, ...]:
    """What a reader of the reports should know: ranks that were clipped, and cuts in a near tie.

    Args:
        reports: Reports of all matrices.
        plans: What was planned for each tensor.

    Returns:
        Sentences; none where all is well.
    """
    clipped = [plan.name for plan in plans if plan.edit and (plan.r or 0) > min(matrix_shape(plan.shape)[1:])]
    ties = [report.name for report in reports if report.projector_bound > NEAR_TIE]
    warnings = []
    if clipped:
        warnings.append(
            f"r exceeds the smaller side of {len(clipped)} tensors, which use all directions: {listing(clipped, 3)}"
        )
    if ties:
        warnings.append(
            f"In {len(ties)} matrices the cut at r falls between nearly equal singular values, so which directions "
            f"are taken is not well defined there (the energy they hold is): {listing(ties, 3)}"
        )
    return (*warnings, *coarse_steps(plans))


def check_something_changed(reports: Iterable[TensorReport], aligned: str, base: str) -> None:
    """Refuse a base that equals the aligned model.

    Args:
        reports: Reports of all matrices.
        aligned: Name of the aligned model.
        base: Name of the base.

    Raises:
        PairingError: If no matrix differs.
    """
    if all(report.method == "zero" for report in reports):
        raise PairingError(f"{aligned} and {base} are equal in every selected tensor: nothing to extrapolate.")


def _edit_matrix(
    plan: TensorPlan, matrix: Tensor, number: int, factors: Directions, sink: MatrixSink
) -> Decomposition:
    def write(part: slice, tile: Tensor) -> None:
        sink(number, part, tile)

    everything = slice(0, len(matrix))
    if plan.alpha == 0:  # adding zero would turn -0.0 into 0.0
        write(everything, matrix)
        return without_directions(matrix.shape, 0.0, "none")
    if plan.r is None:
        full = FullPart(factors.delta(plan, number, matrix), plan.alpha)
        extrapolate(matrix, full, write)
        return without_directions(matrix.shape, full.energy, "full" if full.energy > 0 else "zero")
    found = factors.find(plan, number, matrix)
    if found.factors.rank == 0:
        write(everything, matrix)
    else:
        extrapolate(matrix, LowRankPart(found.factors, plan.alpha), write)
    return found


def without_directions(shape: tuple[int, ...], energy: float, method: str) -> Decomposition:
    """Return what is known of a matrix that is edited without directions, or not at all.

    Args:
        shape: (m, n).
        energy: ||dW||_F^2.
        method: What was done: "full", "none" or "zero".

    Returns:
        No directions, with the energy.
    """
    rows, columns = shape
    nothing = LowRank(
        *(torch.empty(size, dtype=torch.float32, device="cpu") for size in ((rows, 0), (0,), (0, columns)))
    )
    return Decomposition(nothing, energy, 0.0, 0.0, 0, method)
