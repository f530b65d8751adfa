"""Weights between models: a linear combination of matrices, directions on top, a product added; float32 row tiles."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lox_hf.core.buffers import scratch
from lox_hf.core.delta import tile_slices
from lox_hf.core.extrapolate import LowRankPart, check_range
from lox_hf.core.lowrank import LowRank


@torch.no_grad()
def combine(parts: Sequence[tuple[Tensor, float]], out: Tensor, directions: LowRank | None = None) -> None:
    """Form W = sum_i c_i W_i + U S Vh in place: upcast to float32, add, round once to the dtype of `out`.

    With W_base, 1 and the directions of dW it is W_base + Proj_k(dW), from which the paper reads the effective rank
    (section 3); with several models it is a point of the plane that they span.

    Args:
        parts: Matrices (m, n) of any floating dtype and device with their coefficients; those with coefficient 0 are
            not read. A single one with coefficient 1 and without directions is copied bit for bit where the dtypes
            are equal.
        out: W, (m, n); overwritten, and none of the parts.
        directions: U (m, k), S (k,), Vh (k, n).

    Raises:
        NumericsError: If a part, or the result in the dtype of `out`, is not finite.

    Example:
        >>> import torch
        >>> out = torch.empty(2, 2)
        >>> combine([(torch.ones(2, 2), 0.5), (torch.eye(2), 2.0)], out)
        >>> out.tolist()
        [[2.5, 0.5], [0.5, 2.5]]
    """
    read = [(matrix, coefficient) for matrix, coefficient in parts if coefficient != 0]
    device, added = out.device, None
    if directions is not None and directions.rank:
        added = LowRankPart(directions.to(device), 1.0)
    for part in tile_slices(*out.shape, device=device):
        tile = scratch("sum", out[part].shape, torch.float32, device)
        if not read:
            tile.zero_()
        for number, (matrix, coefficient) in enumerate(read):
            if number == 0:  # 0 + c W would turn -0.0 into 0.0
                tile.copy_(matrix[part])
                if coefficient != 1:
                    tile.mul_(coefficient)
            else:
                rows = matrix[part]
                tile.add_(scratch("part", rows.shape, torch.float32, device).copy_(rows), alpha=coefficient)
        if added is not None:
            added.add(part, tile)
        check_range(tile, out.dtype)
        out[part].copy_(tile)


@torch.no_grad()
def add_product(weight: Tensor, left: Tensor, right: Tensor) -> None:
    """W <- W + left @ right in float32 row tiles, each rounded once to the dtype of W.

    Args:
        weight: W (m, n), changed in place.
        left: (m, k).
        right: (k, n).
    """
    left, right = left.to(weight.device, torch.float32), right.to(weight.device, torch.float32)
    for part in tile_slices(*weight.shape, device=weight.device):
        rows = weight[part]
        rows.copy_(scratch("sum", rows.shape, torch.float32, rows.device).copy_(rows).addmm_(left[part], right))
