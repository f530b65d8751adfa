"""The change alignment made to one matrix, in float32 row tiles: it is never held as a whole."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lox_hf.core.buffers import scratch

TILE_ELEMENTS = 512 * 1024
"""Elements of a row tile: 2 MiB of float32, which stays in a core's cache between the two products that read it."""


def tile_slices(rows: int, columns: int, tile_elements: int = TILE_ELEMENTS) -> Iterator[slice]:
    """Cut `rows` x `columns` into slices of whole rows with at most `tile_elements` elements (at least one row)."""
    step = max(1, tile_elements // max(1, columns))
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
        self.shape = (len(aligned) if rows is None else len(rows), aligned.shape[1])
        self.device = aligned.device

    def restrict(self, rows: Tensor) -> "Delta":
        """Return dW with only these rows; the rest is known to be zero."""
        return Delta(self.aligned, self.base, rows=rows, cast_base=self.cast_base, found=self.found)

    def deflate(self, left: Tensor, right: Tensor) -> "Delta":
        """Return dW - left @ right: what remains when the factors found so far are taken out."""
        return Delta(self.aligned, self.base, cast_base=self.cast_base, found=(left, right))

    def sample(self, every: int) -> "Delta":
        """Return dW with one row in `every`: a cheap look at the whole."""
        return Delta(self.aligned[::every], self.base[::every], cast_base=self.cast_base, found=self._sampled(every))

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, float32 tile) pairs from top to bottom."""
        for part in tile_slices(*self.shape):
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
        return result

    def _sampled(self, every: int) -> tuple[Tensor, Tensor] | None:
        return None if self.found is None else (self.found[0][::every], self.found[1])

    def _pick(self, matrix: Tensor, part: slice) -> Tensor:
        return matrix[part] if self.rows is None else matrix.index_select(0, self.rows[part])
