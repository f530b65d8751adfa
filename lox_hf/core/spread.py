"""One matrix's change when its rows are spread over processes: who they are, and what they tell each other."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lox_hf.core.delta import Delta
from lox_hf.errors import DistributedError, LoxError

DEVICE_ERRORS = tuple(
    getattr(torch, name) for name in ("OutOfMemoryError", "AcceleratorError") if hasattr(torch, name)
)
"""What is wrong with this process's own device, and says nothing of the others."""
Numbers = slice | Tensor
"""Which rows or columns of a matrix: a slice where they follow each other, so that taking them makes no copy."""


class Peers:
    """The processes that hold the pieces of one matrix. All of them call the same methods in the same order.

    Args:
        groups: Their process groups: one, or one for every dimension of their mesh.
        device: Where tensors have to be for these groups to send them.
        copies: In how many processes each piece is.
    """

    def __init__(
        self, groups: Sequence["dist.ProcessGroup | None"], device: torch.device, *, copies: int = 1
    ) -> None:
        self.groups, self.device, self.copies = list(groups), device, copies

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over the pieces, the same bits everywhere; `values` may be overwritten."""
        total = values.to(self.device).contiguous()
        with listening():
            for group in self.groups if total.numel() else ():
                dist.all_reduce(total, group=group)
        return (total / self.copies if self.copies > 1 else total).to(values.device)

    def agree(self, values: Tensor) -> Tensor:
        """Return the first process's values, of the same shape and dtype as those here, which may be overwritten."""
        agreed = values.to(self.device).contiguous()
        with listening():
            for group in self.groups if agreed.numel() else ():
                dist.broadcast(agreed, group=group, group_src=0)
        return agreed.to(values.device)

    def join(self, own: Tensor) -> Tensor:
        """Return the values of all processes one after another; each has as many. For a single group."""
        group, moved = self.groups[0], own.to(self.device).contiguous()
        joined = moved.new_empty(dist.get_world_size(group), *moved.shape)
        with listening():
            dist.all_gather(list(joined), moved, group=group)
        return joined.flatten(0, 1).to(own.device)

    def gather(self, own: Any) -> list[Any]:
        """Return what every process gives; it is pickled."""
        found = [own]
        for group in self.groups:
            told: list[Any] = [None] * dist.get_world_size(group)
            with listening():
                dist.all_gather_object(told, found, group=group)
            found = [item for items in told for item in items]
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """Have an error of one process raised in all of them when they leave, so that none waits for another.

        Raises:
            Exception: Of this process.
            LoxError: Else the first of another one's.
            DistributedError: Else, that another process failed in a way that is not ours to name.
        """
        error: Exception | None = None
        try:
            yield
        except DistributedError:  # a process is gone: nobody is there to be told
            raise
        except Exception as own:
            error = own
        told = [other for other in self.gather(_as_told(error)) if other is not None]
        foreign = [other for other in told if not isinstance(other, LoxError)]
        if error is not None and not (foreign and isinstance(error, LoxError)):
            raise error
        if foreign:  # also where this process has an error of ours: what follows one is alike everywhere
            raise DistributedError(f"Another process failed, so all of them stop. {foreign[0]}") from error
        for other in told:
            raise other


class Rows:
    """Rows of a matrix that lie in several tensors, read as those of one.

    Args:
        pieces: (m_i, n) each, of one dtype and device.
    """

    def __init__(self, pieces: Sequence[Tensor]) -> None:
        self.pieces, self.dtype, self.device = list(pieces), pieces[0].dtype, pieces[0].device
        self.shape = (sum(map(len, pieces)), pieces[0].shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> Tensor:
        """Return rows: a view where they lie in one tensor and follow each other."""
        start, stop, step = part.indices(len(self))
        if step != 1:
            return self.index_select(0, torch.arange(start, stop, step, device=self.device))
        found, first = [], 0
        for piece in self.pieces:
            found.append(piece[max(0, start - first) : max(0, stop - first)])
            first += len(piece)
        found = [rows for rows in found if len(rows)] or found[:1]
        return found[0] if len(found) == 1 else torch.cat(found)

    def index_select(self, dim: int, numbers: Tensor) -> Tensor:
        """Return the rows (dim 0) with these numbers, which ascend."""
        found, first = [], 0
        for piece in self.pieces:
            inside = numbers[(numbers >= first) & (numbers < first + len(piece))]
            found.append(piece.index_select(dim, inside - first))
            first += len(piece)
        return torch.cat(found)


class SpreadDelta(Delta):
    """dW = W_aligned - W_base of a matrix of which this process holds some rows.

    What is a sum over rows is added up over the processes, so that every one of them finds the directions of the
    whole, and reads its own rows only.

    Args:
        aligned: Rows of this process, (rows, n).
        base: The same rows of the base.
        numbers: Which of the m rows these are.
        height: m.
        peers: The processes that hold the matrix.
        cast_base: Round the base to the dtype of `aligned` before it is subtracted.
    """

    def __init__(
        self,
        aligned: Tensor | Rows,
        base: Tensor,
        *,
        numbers: Numbers,
        height: int,
        peers: Peers,
        cast_base: bool = False,
    ) -> None:
        super().__init__(cast("Tensor", aligned), base, cast_base=cast_base)  # of which it asks for rows only
        self.numbers, self.height, self.peers = numbers, height, peers

    @property
    def whole_shape(self) -> tuple[int, int]:
        """(m, n) of the matrix."""
        return self.height, self.shape[1]

    def deflate(self, left: Tensor, right: Tensor) -> "SpreadDelta":
        """Return dW - left @ right, with left (m, j) of the whole matrix."""
        return super().deflate(left[self.numbers], right)

    def sample(self, every: int) -> "SpreadDelta":
        """Return dW with one in `every` of the rows here."""
        numbers = self.numbers
        thinned = slice(numbers.start, numbers.stop, every) if isinstance(numbers, slice) else numbers[::every]
        return super().sample(every)._but(numbers=thinned)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over the rows of all processes."""
        return self.peers.total(values)

    def agree(self, values: Tensor) -> Tensor:
        """Return the first process's values."""
        return self.peers.agree(values)

    def whole_rows(self, values: Tensor) -> Tensor:
        """Put values of the rows here, (rows, k), among those of all rows, (m, k)."""
        whole = torch.zeros((self.height, values.shape[1]), dtype=values.dtype, device=values.device)
        whole[self.numbers] = super().whole_rows(values)
        return self.peers.total(whole)


def _as_told(error: Exception | None) -> Exception | str | None:
    """An error as it is sent: ours can be pickled, of others only the text is sure to be."""
    return error if error is None or isinstance(error, LoxError) else f"{type(error).__name__}: {error}"


@contextmanager
def listening() -> Iterator[None]:
    """Say in our words that another process does not answer.

    Raises:
        DistributedError: Where torch raises an error of its own.
        RuntimeError: Where the device does.
    """
    try:
        yield
    except DEVICE_ERRORS:
        raise
    except RuntimeError as error:  # torch's word for a connection that broke, or an answer that did not come in time
        raise DistributedError(
            "A process that works with this one does not answer: it has failed or was lost. Load "
            f"the model again in all processes, and look at what the other one says. ({error})"
        ) from error
