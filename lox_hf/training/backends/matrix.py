"""One weight matrix of a model in training: what it reads as, and how it is changed so that training keeps it."""

from typing import Protocol

import torch
from torch import Tensor

from lox_hf.core.combine import add_product
from lox_hf.core.geometry import coordinates
from lox_hf.core.lowrank import LowRank


class LiveMatrix(Protocol):
    """W as the forward pass uses it, whatever it is made of.

    Where `collective` is set every process has to call the same methods in the same order; each gets the same result.

    Attributes:
        shape: (m, n) of the whole matrix.
        dtype: Its dtype.
        collective: Whether the processes read and change it together.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    collective: bool

    def dense(self) -> Tensor:
        """Return the whole of W, (m, n)."""
        ...

    def coordinates(self, directions: LowRank) -> Tensor:
        """Return U_k^T W V_k, (k, k) float64 on the CPU."""
        ...

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add left (m, k) @ right (k, n) to W in place, so that the next optimiser step and a save keep it."""
        ...


class PlainMatrix:
    """A matrix that is a tensor of this process.

    Args:
        weight: W, (m, n): a view of the parameter; changed in place by `add`.
    """

    collective = False

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.shape = (weight.shape[0], weight.shape[1])
        self.dtype = weight.dtype

    def dense(self) -> Tensor:
        """Return the tensor itself."""
        return self.weight.detach()

    def coordinates(self, directions: LowRank) -> Tensor:
        """Return U_k^T W V_k."""
        return coordinates(self.weight.detach(), directions)

    @torch.no_grad()
    def add(self, left: Tensor, right: Tensor) -> None:
        """Add left @ right in float32 and round once to the dtype of W."""
        add_product(self.weight, left, right)
