"""A matrix that torch cuts, as a DTensor: FSDP2, HSDP, tensor parallelism, and meshes of several of them."""

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from lox_hf.core.spread import Numbers, Peers, listening
from lox_hf.weights.spread.matrix import Block, SpreadMatrix

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this is a DTensor."""
    return any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)


def mesh_peers(mesh: "DeviceMesh", copies: int = 1) -> Peers:
    """Return the processes of a mesh.

    Args:
        mesh: The mesh.
        copies: In how many of its processes each piece is.

    Returns:
        The processes.
    """
    groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
    index = 0 if mesh.device_type == "cpu" else torch.accelerator.current_device_index()
    return Peers(groups, torch.device(mesh.device_type, index), copies=copies)


class DTensorMatrix(SpreadMatrix):
    """A matrix of which this process holds some rows and columns: every placement, on a mesh of any dimensions.

    Args:
        weight: W, (m, n), a DTensor.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = cast("DTensor", weight.detach())
        self.shape = (weight.shape[0], weight.shape[1])
        self.dtype = weight.dtype
        mesh, placements = self.weight.device_mesh, self.weight.placements
        copies = math.prod(mesh.size(dim) for dim, kind in enumerate(placements) if kind.is_replicate())
        self.peers = mesh_peers(mesh, copies)

    @property
    def device(self) -> torch.device:
        """Where the local piece is."""
        return self._local.device

    @property
    def _local(self) -> Tensor:
        return self.weight.to_local()

    def blocks(self) -> list[Block]:
        """Return the local piece."""
        return [Block(self._numbers(0), self._numbers(1), self._local)]

    def row_share(self) -> tuple[Numbers, Tensor]:
        """Return the local piece itself where rows are cut; where columns are, rows of this one matrix are sent."""
        from torch.distributed.tensor import Shard

        by_rows = [Shard(0) if _cuts(kind, 1) else kind for kind in self.weight.placements]
        if by_rows == list(self.weight.placements):
            return self._numbers(0), self._local
        with listening():
            moved = DTensorMatrix(self.weight.redistribute(placements=by_rows))
        return moved._numbers(0), moved._local

    def dense(self) -> Tensor:
        """Return the whole matrix, gathered."""
        with listening():
            return self.weight.full_tensor()

    def check_in_place(self) -> None:
        """Do nothing: the piece is what the model and the optimiser work on."""

    def commit(self) -> None:
        """Do nothing: they have it already."""

    def _numbers(self, dim: int) -> Numbers:
        """Numbers of the rows (dim 0) or columns (dim 1) of W in the local piece."""
        from torch.distributed.tensor import Replicate, distribute_tensor

        # Torch cuts the numbers as it has cut the matrix: uneven, empty and strided pieces need no arithmetic here.
        shape = (-1, 1) if dim == 0 else (1, -1)
        placements: list[Placement] = [kind if _cuts(kind, dim) else Replicate() for kind in self.weight.placements]
        numbers = torch.arange(self.shape[dim], device=self.device).view(shape)
        # Without a source rank nothing is sent: every process cuts its own copy.
        cut = distribute_tensor(numbers, self.weight.device_mesh, placements, src_data_rank=None)
        return as_numbers(cut.to_local().flatten().cpu())


def as_numbers(numbers: Tensor) -> Numbers:
    """Return ascending numbers as a slice where they follow each other."""
    if len(numbers) == 0:
        return slice(0, 0)
    first, last = int(numbers[0]), int(numbers[-1])
    return slice(first, last + 1) if last - first == len(numbers) - 1 else numbers


def _cuts(placement: "Placement", dim: int) -> bool:
    return getattr(placement, "dim", None) in (dim, dim - 2)
