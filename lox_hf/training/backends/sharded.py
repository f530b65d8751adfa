"""A matrix in pieces over processes as a DTensor: FSDP2, tensor parallelism."""

from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lox_hf.core.geometry import coordinates
from lox_hf.core.lowrank import LowRank
from lox_hf.errors import NumericsError
from lox_hf.training.backends.matrix import add_product

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor."""
    return any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)


class ShardedMatrix:
    """A matrix of which this process holds some rows and columns: every placement, on a mesh of any dimensions.

    A process holds no more than its own piece, except in `dense`: C is the sum of U[rows]^T W_piece V[columns] over
    the pieces, so a reading moves k x k numbers only.

    Args:
        weight: W, (m, n), a DTensor; its local piece is changed in place by `add`.
    """

    collective = True

    def __init__(self, weight: Tensor) -> None:
        self.weight = cast("DTensor", weight)
        self.shape = (weight.shape[0], weight.shape[1])
        self.dtype = weight.dtype

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return the whole of W, gathered."""
        return self.weight.full_tensor()

    @torch.no_grad()
    def coordinates(self, directions: LowRank) -> Tensor:
        """Return U_k^T W V_k, summed over the pieces in float64; the same numbers on every process.

        Args:
            directions: U_k (m, k) and V_k^T (k, n), the same on every process.

        Returns:
            (k, k), float64 on the CPU.

        Raises:
            NumericsError: If any piece contains NaN or Inf: on every process, whichever holds it.
        """
        left, right = self._cut(directions.U, directions.Vh)
        try:
            found = coordinates(self.weight.to_local(), LowRank(left, directions.S, right))
        except NumericsError:  # the other processes wait for this one's numbers: say it after the sum, with them
            found = torch.full((left.shape[1], len(right)), torch.nan, dtype=torch.float64)
        found = self._sum(found)
        if not torch.isfinite(found).all():
            raise NumericsError("W contains NaN or Inf")
        return found

    @torch.no_grad()
    def add(self, left: Tensor, right: Tensor) -> None:
        """Add left @ right to this process's piece, which is also what the optimiser works on."""
        add_product(self.weight.to_local(), *self._cut(left, right))

    def _cut(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of a left (m, k) and the columns of a right (k, n) factor that belong to this process's piece."""
        rows, columns = self._numbers(0), self._numbers(1)
        return left[rows.to(left.device)], right[:, columns.to(right.device)]

    def _numbers(self, dim: int) -> Tensor:
        """Numbers of the rows (dim 0) or columns (dim 1) of W in this process's piece."""
        from torch.distributed.tensor import Replicate, distribute_tensor

        # Torch cuts the numbers as it has cut the matrix: uneven, empty and strided pieces need no arithmetic here.
        shape = (-1, 1) if dim == 0 else (1, -1)
        placements = [
            placement if getattr(placement, "dim", None) in (dim, dim - 2) else Replicate()
            for placement in self.weight.placements
        ]
        numbers = torch.arange(self.shape[dim]).view(shape)
        # Without a source rank nothing is sent: every process cuts its own copy.
        cut = distribute_tensor(numbers, self.weight.device_mesh, placements, src_data_rank=None)
        return cut.to_local().flatten()

    def _sum(self, found: Tensor) -> Tensor:
        """Sum over the pieces; over copies of a piece, the mean."""
        mesh = self.weight.device_mesh
        found = found.to(mesh.device_type)  # NCCL takes no tensors of the CPU
        for dim, placement in enumerate(self.weight.placements):
            dist.all_reduce(found, group=mesh.get_group(dim))
            if placement.is_replicate():
                found /= mesh.size(dim)
        return found.cpu()
