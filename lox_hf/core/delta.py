"""The change alignment made to one matrix, in float32 row tiles: it is never held as a whole."""

import copy
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor

from lox_hf.core.buffers import scratch

TILE_ELEMENTS = 512 * 1024
"""Elements of a row tile: 2 MiB of float32, which stays in a core's cache between the two products that read it."""

DEVICE_TILE_ELEMENTS = 32 * 1024 * 1024
"""Elements of a row tile on an accelerator, where what counts is that few kernels are started."""


def tile_slices(
    rows: int, columns: int, tile_elements: int | None = None, *, device: torch.device | None = None
) -> Iterator[slice]:
    """Cut `rows` x `columns` into slices of whole rows with at most `tile_elements` elements (at least one row).

    Args:
        rows: Rows of the matrix.
        columns: Columns of the matrix.
        tile_elements: The most elements a slice may have; what suits `device` when None.
        device: Where the slices are worked on; the CPU when None.

    Yields:
        Slices of row numbers from top to bottom.
    """
    on_cpu = device is None or device.type == "cpu"
    limit = tile_elements or (TILE_ELEMENTS if on_cpu else DEVICE_TILE_ELEMENTS)
    step = max(1, limit // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class Delta:
    """dW = W_aligned - W_base of one matrix (paper, section 3), read tile by tile.

    Both sides are upcast to float32 before they are subtracted, so the difference of two bfloat16 or float16 numbers
    is exact up to float32's own rounding. One tile buffer is reused: a tile is valid until the next one is taken.

    Args:
        aligned: (m, n), any floating dtype; read, never written.
        base: (m, n), any floating dtype; read, never written.
        rows: Row numbers, ascending, to which dW is restricted; all rows when None.
        cast_base: Round the base to the dtype of `aligned` before it is subtracted.
        found: Left (m, j) and right (j, n) factors of a part that is subtracted as well.
    """

    def __init__(
        self,
        aligned: Tensor,
        base: Tensor,
        *,
        rows: Tensor | None = None,
        cast_base: bool = False,
        found: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.aligned, self.base, self.rows, self.cast_base, self.found = aligned, base, rows, cast_base, found
        self.device = aligned.device

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns that `tiles` yields."""
        return len(self.aligned if self.rows is None else self.rows), self.aligned.shape[1]

    @property
    def whole_shape(self) -> tuple[int, int]:
        """(m, n) of the matrix, with all rows that are left out or that other processes hold."""
        return self.aligned.shape[0], self.aligned.shape[1]

    def restrict(self, rows: Tensor) -> Self:
        """Return dW with only these rows; the rest is known to be zero."""
        return self._but(rows=rows)

    def deflate(self, left: Tensor, right: Tensor) -> Self:
        """Return dW - left @ right: what remains when the factors found so far are taken out."""
        return self._but(found=(left, right))

    def sample(self, every: int) -> Self:
        """Return dW with one row in `every`: a cheap look at the whole."""
        found = None if self.found is None else (self.found[0][::every], self.found[1])
        return self._but(aligned=self.aligned[::every], base=self.base[::every], found=found)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over all rows, of values that are a sum over the rows here: nothing is elsewhere."""
        return values

    def agree(self, values: Tensor) -> Tensor:
        """Return the values that every process goes on with, where several work on one matrix: its own, alone."""
        return values

    def whole_rows(self, values: Tensor) -> Tensor:
        """Put values of the rows here, (rows, k), among those of all rows, (m, k), which are zero where left out."""
        if self.rows is None:
            return values
        whole = torch.zeros((len(self.aligned), values.shape[1]), dtype=values.dtype, device=values.device)
        return whole.index_copy_(0, self.rows, values)

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, float32 tile) pairs from top to bottom."""
        for part in tile_slices(*self.shape, device=self.device):
            tile = scratch("delta", (part.stop - part.start, self.shape[1]), torch.float32, self.device)
            tile.copy_(self._pick(self.aligned, part)).sub_(self.base_rows(part))
            if self.found is not None:
                tile.addmm_(self._pick(self.found[0], part), self.found[1], alpha=-1)
            yield part, tile

    def base_rows(self, part: slice) -> Tensor:
        """Rows of W_base as they are subtracted: on the device of `aligned`, and rounded to its dtype if asked for."""
        rows = self._pick(self.base, part)
        return rows.to(device=self.device, dtype=self.aligned.dtype if self.cast_base else rows.dtype)

    def dense(self) -> Tensor:
        """Return the whole of dW, float32 (m, n); for small matrices and the exact decomposition."""
        result = torch.empty(self.shape, dtype=torch.float32, device=self.device)
        for part, tile in self.tiles():
            result[part] = tile
        return self.whole_rows(result)

    def _but(self, **changes: Any) -> Self:
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def _pick(self, matrix: Tensor, part: slice) -> Tensor:
        return matrix[part] if self.rows is None else matrix.index_select(0, self.rows[part])
