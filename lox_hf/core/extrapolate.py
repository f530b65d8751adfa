"""The one equation: W_LoX = W_aligned + alpha * Proj_k(W_aligned - W_base).

Every path (memory, disk, adapter) comes through here. Dtype policy: upcast to float32, compute, round once to the
stored dtype.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lox_hf.core.buffers import scratch
from lox_hf.core.delta import Delta, tile_slices
from lox_hf.core.lowrank import LowRank
from lox_hf.errors import NumericsError

Sink = Callable[[slice, Tensor], None]
"""Takes finished rows: the slice of rows and a tile in the stored dtype, which is valid only during the call."""


class LowRankPart:
    """alpha * U S Vh, added to or taken from rows of a float32 tile.

    Args:
        factors: U, S, Vh.
        alpha: Strength.
    """

    def __init__(self, factors: LowRank, alpha: float) -> None:
        self.left, self.right = factors.U * (alpha * factors.S), factors.Vh.contiguous()

    def add(self, part: slice, tile: Tensor) -> None:
        """Turn aligned rows into hardened ones, in place."""
        tile.addmm_(self.left[part], self.right)

    def take_away(self, part: slice, tile: Tensor) -> None:
        """Turn hardened rows into aligned ones, in place and up to rounding."""
        tile.addmm_(self.left[part], self.right, alpha=-1)


class FullPart:
    """alpha * dW, added to or taken from rows of a float32 tile; measures dW on the way.

    Args:
        delta: dW.
        alpha: Strength.
    """

    def __init__(self, delta: Delta, alpha: float) -> None:
        self.delta, self.alpha, self.energy = delta, alpha, 0.0

    def add(self, part: slice, tile: Tensor) -> None:
        """Turn aligned rows into hardened ones, in place."""
        change = scratch("delta", tile.shape, torch.float32, tile.device).copy_(tile).sub_(self.delta.base_rows(part))
        self.energy += torch.linalg.vector_norm(change).double().square().item()
        if not math.isfinite(self.energy):
            raise NumericsError("dW contains NaN or Inf")
        tile.add_(change, alpha=self.alpha)

    def take_away(self, part: slice, tile: Tensor) -> None:
        """Turn hardened rows into aligned ones: W = (W_hardened + alpha W_base) / (1 + alpha), up to rounding."""
        tile.add_(self.delta.base_rows(part), alpha=self.alpha).div_(1 + self.alpha)


def extrapolate(aligned: Tensor, added: LowRankPart | FullPart, sink: Sink) -> None:
    """Form W_aligned + alpha * Proj_k(dW) in row tiles (paper, section 3) and hand every tile to `sink`.

    Args:
        aligned: W_aligned, (m, n), any floating dtype; read tile by tile, so a sink may write a tile back over it.
        added: alpha * Proj_k(dW), or alpha * dW for the full rank (ExPO; the reference's k = 0).
        sink: Receives the rows in the dtype of `aligned`.

    Raises:
        NumericsError: If dW contains NaN or Inf, or a result overflows the stored dtype.
    """
    for part in tile_slices(*aligned.shape, device=aligned.device):
        rows = aligned[part]
        tile = scratch("sum", rows.shape, torch.float32, rows.device).copy_(rows)
        added.add(part, tile)
        check_range(tile, aligned.dtype)
        sink(part, scratch("rounded", rows.shape, aligned.dtype, rows.device).copy_(tile))


def lora_factors(directions: LowRank, alpha: float) -> tuple[Tensor, Tensor]:
    """The same addition as LoRA factors: alpha * U S Vh = B A, balanced between the two.

    Args:
        directions: U, S, Vh.
        alpha: Strength, positive.

    Returns:
        B (m, k) and A (k, n), float32.

    Raises:
        NumericsError: If alpha is so large that they overflow.
    """
    root = (alpha * directions.S).sqrt()
    if not root.isfinite().all():
        raise NumericsError(f"The factors overflow float32: alpha = {alpha} is too large")
    return directions.U * root, root[:, None] * directions.Vh


def check_range(tile: Tensor, dtype: torch.dtype) -> None:
    """Refuse what would become Inf or is not a number.

    A finite sum of a tile says that all of it is finite, at a third of the cost of asking every entry.

    Args:
        tile: float32 rows that are about to be rounded.
        dtype: What they are rounded to.

    Raises:
        NumericsError: If one of them is not finite, or does not fit.
    """
    largest = max(map(abs, torch.stack(torch.aminmax(tile)).tolist())) if dtype == torch.float16 else 0.0
    if largest > torch.finfo(dtype).max or not math.isfinite(tile.sum()):
        name = str(dtype).removeprefix("torch.")
        raise NumericsError(
            f"the result overflows {name}, or the weight contains NaN or Inf; lower alpha, or check it"
        )
