"""One weight matrix in pieces over processes: what this process holds of it, and what all of them do with it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lox_hf.core.combine import add_product
from lox_hf.core.delta import Delta
from lox_hf.core.geometry import coordinates
from lox_hf.core.lowrank import LowRank
from lox_hf.core.spread import Numbers, Peers, Rows, SpreadDelta
from lox_hf.errors import NumericsError


@dataclass(frozen=True)
class Block:
    """A rectangle of the matrix that is in this process.

    Attributes:
        rows: Numbers of its rows in the matrix.
        columns: Numbers of its columns.
        view: The weights, (rows, columns): a view of what the model uses.
        master: The optimiser's float32 copy of them, where there is one: steps begin from it.
    """

    rows: Numbers
    columns: Numbers
    view: Tensor
    master: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.view.device

    @property
    def working(self) -> Tensor:
        """What a change is added to: the optimiser's copy where there is one."""
        return self.view if self.master is None else self.master

    def cut(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of a left (m, k) and the columns of a right (k, n) factor that belong to this rectangle."""
        return left[self.rows], right[:, self.columns]

    def delta(self, base: Tensor, *, cast_base: bool) -> Delta:
        """Return dW of this rectangle, given the base (m, n)."""
        return Delta(self.view, base[self.rows][:, self.columns], cast_base=cast_base)


class SpreadMatrix(ABC):
    """A matrix of which every process holds a piece. All of them call the same methods in the same order.

    No process gets more than its piece, except from `dense`, and by `delta` for matrices that are not cut by rows.

    Attributes:
        shape: (m, n) of the whole matrix.
        dtype: Its dtype.
        peers: The processes.
    """

    collective = True
    shape: tuple[int, int]
    dtype: torch.dtype
    peers: Peers

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where this process holds its piece."""

    @abstractmethod
    def blocks(self) -> list[Block]:
        """Return the rectangles in this process; together those of all processes are the matrix."""

    @abstractmethod
    def row_share(self) -> tuple[Numbers, Tensor | Rows]:
        """Return whole rows for this process to work on, and their numbers: each row is in one process's share."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the whole matrix, gathered."""

    @abstractmethod
    def check_in_place(self) -> None:
        """Raise `UnsupportedModelError` where what is written into the blocks could not be taken back there."""

    @abstractmethod
    def commit(self) -> None:
        """Let the model have what was written into the blocks."""

    @torch.no_grad()
    def delta(self, base: Tensor, *, cast_base: bool) -> SpreadDelta:
        """Return dW over the processes, given the base (m, n): this process reads its own rows of both."""
        numbers, rows = self.row_share()
        own = base[numbers].to(self.device)  # once, and not in every pass
        return SpreadDelta(
            rows, own, numbers=numbers, height=self.shape[0], peers=self.peers, cast_base=cast_base
        )

    @torch.no_grad()
    def coordinates(self, directions: LowRank) -> Tensor:
        """Return U_k^T W V_k, the sum over the pieces of U[rows]^T W V[columns]: only k x k numbers are sent.

        Args:
            directions: U_k (m, k) and V_k^T (k, n), the same on every process.

        Returns:
            (k, k), float64 on the CPU; the same numbers on every process.

        Raises:
            NumericsError: If any piece contains NaN or Inf: on every process, whichever holds it.
        """
        found = torch.zeros((directions.rank, len(directions.Vh)), dtype=torch.float64, device="cpu")
        for block in self.blocks():
            left, right = block.cut(directions.U, directions.Vh)
            try:
                found += coordinates(block.view, LowRank(left, directions.S, right))
            except NumericsError:  # the others wait for this process's numbers: it is said after the sum, to all
                found.fill_(torch.nan)
        found = self.peers.total(found)
        if not torch.isfinite(found).all():
            raise NumericsError("W contains NaN or Inf")
        return found

    @torch.no_grad()
    def add(self, left: Tensor, right: Tensor) -> None:
        """Add left (m, k) @ right (k, n) to W in place, so that the next optimiser step and a save keep it."""
        for block in self.blocks():
            add_product(block.working, *block.cut(left, right))
            if block.master is not None:
                block.view.copy_(block.master)  # rounded once, as the optimiser's own step does
        self.commit()
