"""A matrix that DeepSpeed ZeRO-3 cuts: each process holds a stretch of its elements, in the order of the rows."""

from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from lox_hf.core.spread import Numbers, Peers, Rows
from lox_hf.errors import UnsupportedModelError
from lox_hf.weights.spread.matrix import Block, SpreadMatrix


def is_partitioned(tensor: Tensor) -> bool:
    """Whether this is a parameter under ZeRO-3."""
    return hasattr(tensor, "ds_id")


def is_stepped(tensor: Tensor) -> bool:
    """Whether ZeRO stage 1 or 2 trains this, whose optimiser goes on from a float32 copy that it keeps."""
    return hasattr(tensor, "_hp_mapping")


class ZeroMatrix(SpreadMatrix):
    """A matrix under ZeRO-3, before and after the engine exists; what the optimiser keeps of it in float32 as well.

    Args:
        weight: W, (m, n): the parameter, which is empty between uses.

    Raises:
        UnsupportedModelError: If the elements are on a disk.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = cast("Any", weight)  # DeepSpeed's attributes are in no type
        rows, columns = self.weight.ds_shape
        self.shape, self.dtype = (rows, columns), weight.dtype
        group = self.weight.ds_process_group
        self.peers = Peers([group], weight.device)
        self.rank, self.size = dist.get_rank(group), self.weight.partition_numel()
        self._written: Tensor | None = None
        if self.weight.ds_tensor.status.name != "AVAILABLE":
            raise UnsupportedModelError(
                f"A weight of shape {self.shape} is offloaded to a disk by DeepSpeed. Set offload_param to none or "
                "cpu, or harden the files with harden_checkpoint."
            )

    @property
    def device(self) -> torch.device:
        """Where the stretch of this process is."""
        return self.weight.ds_tensor.device

    def blocks(self) -> list[Block]:
        """Return the rest of a row, whole rows, and the start of a row, as far as each is here."""
        flat, columns = self.weight.ds_tensor.data, self.shape[1]
        master = self._written = self._master()
        found, begin = [], self._begin(self.rank)
        for start, stop in _cuts(begin, self._begin(self.rank + 1), columns):
            first, width = start // columns, min(stop - start, columns)
            part = slice(start - begin, stop - begin)
            found.append(
                Block(
                    slice(first, first + (stop - start) // width),
                    slice(start % columns, start % columns + width),
                    flat[part].view(-1, width),
                    None if master is None else master[part].view(-1, width),
                )
            )
        return found

    def row_share(self) -> tuple[Numbers, Rows]:
        """Return the rows that begin here; the processes after this one send the rest of the last."""
        columns, begin, end = self.shape[1], self._begin(self.rank), self._begin(self.rank + 1)
        flat = self.weight.ds_tensor.data
        first, whole, last = _next(begin, columns), end // columns, _next(end, columns)
        heads = self._heads()
        pieces = [flat[first * columns - begin : whole * columns - begin].view(-1, columns)] if whole > first else []
        if last > max(first, whole):
            rest = torch.cat([flat[whole * columns - begin : end - begin], *heads[self.rank + 1 :]])
            pieces.append(rest[None, :columns])
        return slice(first, max(first, last)), Rows(pieces or [flat.new_empty((0, columns))])

    def dense(self) -> Tensor:
        """Return the whole matrix, gathered."""
        rows, columns = self.shape
        return self.peers.join(self.weight.ds_tensor.data)[: rows * columns].view(self.shape)

    def check_in_place(self) -> None:
        """Refuse an optimiser whose float32 copy is offloaded: an edit of it could not be taken back in place.

        Raises:
            UnsupportedModelError: If it is.
        """
        if getattr(getattr(self.weight, "_z3_optimizer", None), "offload_optimizer", False):
            raise UnsupportedModelError(
                "DeepSpeed offloads the optimiser, which keeps a copy of the weights. Apply LoX before "
                "deepspeed.initialize, or harden the files with harden_checkpoint."
            )

    def commit(self) -> None:
        """Give the optimiser its part back, and refresh the whole where DeepSpeed keeps it between uses."""
        from deepspeed.utils import safe_set_local_fp32_param

        if self._written is not None:  # a view of it, or a copy where it is offloaded
            safe_set_local_fp32_param(self.weight, self._written)
            self._written = None
        if self.weight.ds_status.name == "AVAILABLE":
            self.weight.data.copy_(self.dense())

    def _begin(self, rank: int) -> int:
        """Number of the first element of a process's stretch; the last ones end before they are full."""
        return min(rank * self.size, self.shape[0] * self.shape[1])

    def _heads(self) -> list[Tensor]:
        """Of every process, what it holds of a row that begins in a process before it."""
        columns = self.shape[1]
        width = min(columns, self.size)
        lengths = [
            min(_next(self._begin(rank), columns) * columns, self._begin(rank + 1)) - self._begin(rank)
            for rank in range(dist.get_world_size(self.weight.ds_process_group))
        ]
        own = self.weight.ds_tensor.data[: lengths[self.rank]]
        heads = self.peers.join(pad(own, (0, width - len(own)))).view(-1, width)
        return [head[:length] for head, length in zip(heads, lengths, strict=True)]

    def _master(self) -> Tensor | None:
        """What the optimiser keeps here, in float32; a frozen matrix, and any before the engine exists, has none."""
        from deepspeed.utils import safe_get_local_fp32_param

        master = safe_get_local_fp32_param(self.weight) if hasattr(self.weight, "_z3_optimizer") else None
        return None if master is None else master.detach()


def _next(element: int, columns: int) -> int:
    """Number of the first row that begins at an element or after it."""
    return -(-element // columns)


def _cuts(begin: int, end: int, columns: int) -> list[tuple[int, int]]:
    """Cut a stretch of elements where rows begin: at its first and at its last one."""
    first, last = (min(max(begin, place * columns), end) for place in (_next(begin, columns), end // columns))
    places = [begin, first, max(first, last), end]
    return [(start, stop) for start, stop in pairwise(places) if stop > start]
