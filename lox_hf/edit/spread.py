"""One matrix that is spread over processes: its directions are found together, and each process edits its pieces."""

import time

import torch
from torch import Tensor

from lox_hf.core.extrapolate import FullPart, LowRankPart, check_range, extrapolate
from lox_hf.core.lowrank import Decomposition, LowRank
from lox_hf.edit.tensor import Directions, naming, tensor_report, without_directions
from lox_hf.edit.undo import Undo
from lox_hf.records import TensorPlan, TensorReport
from lox_hf.weights.spread.matrix import Block, SpreadMatrix


@torch.no_grad()
def edit_spread(plan: TensorPlan, matrix: SpreadMatrix, factors: Directions, undos: list[Undo]) -> TensorReport:
    """Extrapolate one matrix in place; every process that holds a piece of it calls this.

    Args:
        plan: What to do.
        matrix: The matrix.
        factors: Where the directions come from.
        undos: Receives the way back, piece by piece, as each is about to be written.

    Returns:
        The report of the whole matrix, the same on every process but for the time.

    Raises:
        NumericsError: If the matrix is not finite, does not converge or overflows; in every process.
        DistributedError: If another process fails or is lost.
    """
    started = time.perf_counter()
    matrix.check_in_place()
    with naming(plan.name):  # what goes wrong with numbers here goes wrong in every process
        found = _find(plan, matrix, factors)
    blocks = matrix.blocks() if plan.alpha != 0 else []
    energy = 0.0
    with matrix.peers.together(), naming(plan.name):
        for number, block in enumerate(blocks):
            energy += _edit_block(plan, block, number, found, factors, undos)
    if found is None:
        energy = matrix.peers.total(torch.tensor(energy, dtype=torch.float64)).item()
        found = without_directions(matrix.shape, energy, "full" if energy > 0 else "zero")
    if plan.alpha != 0:  # whatever is here: all processes have to
        matrix.commit()
    return tensor_report(plan.name, plan, found, time.perf_counter() - started)


def pieces(name: str, matrix: SpreadMatrix) -> dict[tuple[str, int], Tensor]:
    """Return what an edit of a matrix writes in this process, by the name and number that its `Undo` has.

    Args:
        name: Checkpoint name of the matrix.
        matrix: The matrix.

    Returns:
        The views.
    """
    written = {}
    for number, block in enumerate(matrix.blocks()):
        written[name, 2 * number] = block.view
        if block.master is not None:
            written[name, 2 * number + 1] = block.master
    return written


def _find(plan: TensorPlan, matrix: SpreadMatrix, factors: Directions) -> Decomposition | None:
    """The directions; None for the full rank."""
    if plan.alpha == 0:
        return without_directions(matrix.shape, 0.0, "none")
    return None if plan.r is None else factors.find(plan, 0, matrix)


def _edit_block(
    plan: TensorPlan, block: Block, number: int, found: Decomposition | None, factors: Directions, undos: list[Undo]
) -> float:
    """Edit one rectangle, the optimiser's copy of it as well; return the energy of dW where it is added in full."""
    if found is None:
        added: LowRankPart | FullPart = FullPart(factors.delta(plan, 0, block), plan.alpha)
    elif found.factors.rank:
        left, right = block.cut(found.factors.U, found.factors.Vh)
        added = LowRankPart(LowRank(left, found.factors.S, right), plan.alpha)
    else:
        return 0.0
    undo = Undo(block.view, added, plan.name, 2 * number)
    undos.append(undo)
    if block.master is None:
        extrapolate(block.view, added, undo.write)
    else:
        master = Undo(block.master, added, plan.name, 2 * number + 1)
        undos.append(master)

        def write(part: slice, rows: Tensor) -> None:
            check_range(rows, block.view.dtype)
            master.write(part, rows)
            undo.write(part, rows.to(block.view.dtype))  # rounded once, as the optimiser's own step does

        extrapolate(block.master, added, write)
    return added.energy if isinstance(added, FullPart) else 0.0
