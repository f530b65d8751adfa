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


def extrapolate(aligned: Tensor, factors: LowRank, alpha: float, sink: Sink) -> None:
    """Form W_aligned + alpha * U S Vh in row tiles (paper, section 3) and hand every tile to `sink`.

    Args:
        aligned: W_aligned, (m, n), any floating dtype; read tile by tile, so a sink may write a tile back over it.
        factors: Proj_k(dW) of the same shape.
        alpha: The paper's alpha, the reference's `coef`.
        sink: Receives the rows in the dtype of `aligned`.

    Raises:
        NumericsError: If a result overflows the stored dtype.
    """
    left, right = factors.U * (alpha * factors.S), factors.Vh.contiguous()
    _write(aligned, lambda part, tile: tile.addmm_(left[part], right), sink)


def extrapolate_full(aligned: Tensor, delta: Delta, alpha: float, sink: Sink) -> float:
    """Form W_aligned + alpha * dW, the full-rank form (ExPO; the reference's k = 0), in row tiles.

    Args:
        aligned: W_aligned, (m, n), any floating dtype.
        delta: dW of the same shape.
        alpha: The paper's alpha, the reference's `coef`.
        sink: Receives the rows in the dtype of `aligned`.

    Returns:
        ||dW||_F^2.

    Raises:
        NumericsError: If dW contains NaN or Inf, or a result overflows the stored dtype.
    """
    energy = 0.0
    changes = delta.tiles()

    def add(part: slice, tile: Tensor) -> None:
        nonlocal energy
        change = next(changes)[1]
        energy += torch.linalg.vector_norm(change).double().square().item()
        if energy - energy != 0:
            raise NumericsError("dW contains NaN or Inf")
        tile.add_(change, alpha=alpha)

    _write(aligned, add, sink)
    return energy


def _write(aligned: Tensor, add: Callable[[slice, Tensor], object], sink: Sink) -> None:
    for part in tile_slices(*aligned.shape):
        rows = aligned[part]
        tile = scratch("sum", rows.shape, torch.float32, rows.device).copy_(rows)
        add(part, tile)
        _check_range(tile, aligned.dtype)
        sink(part, scratch("rounded", rows.shape, aligned.dtype, rows.device).copy_(tile))


def _check_range(tile: Tensor, dtype: torch.dtype) -> None:
    """Refuse what would become Inf; a finite sum of a tile says that all of it is finite, at a third of the cost."""
    largest = max(map(abs, torch.stack(torch.aminmax(tile)).tolist())) if dtype == torch.float16 else 0.0
    if largest > torch.finfo(dtype).max or not math.isfinite(tile.sum()):
        name = str(dtype).removeprefix("torch.")
        raise NumericsError(
            f"the result overflows {name}, or the weight contains NaN or Inf; lower alpha, or check it"
        )
