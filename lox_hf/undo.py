"""What it takes to get the aligned weights back bit for bit, in a fraction of their memory.

The hardened weight minus the part that was added is the aligned weight again but for rounding. So only the factors of
that part are kept, and the few entries where rounding does not come back to where it started.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lox_hf.core.buffers import scratch
from lox_hf.core.extrapolate import FullPart, LowRankPart

INTEGERS = {2: torch.int16, 4: torch.int32}


@dataclass
class Undo:
    """The way back for one matrix.

    Attributes:
        matrix: View of the live weight.
        added: What was added to it, up to rounding.
        name: Checkpoint name of the tensor.
        number: Number of the matrix in a stack.
        written: Slices of rows that were written.
        corrections: By first row of a slice: positions of words in it that do not round back, and their aligned bits.
        aligned_sum: Checksum of the aligned bits.
        hardened_sum: Checksum of the hardened bits.
    """

    matrix: Tensor
    added: LowRankPart | FullPart
    name: str = ""
    number: int = 0
    written: list[slice] = field(default_factory=list)
    corrections: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    aligned_sum: int = 0
    hardened_sum: int = 0

    def write(self, part: slice, hardened: Tensor) -> None:
        """Put hardened rows in place and keep what is needed to undo it."""
        target = self.matrix[part]
        aligned, returned = self._words(target), self._words(self._back(part, hardened))
        different = torch.bitwise_xor(aligned, returned, out=returned)  # in place: the returned rows have served
        wrong = different.nonzero().squeeze(1)
        if len(wrong):
            self.corrections[part.start] = (wrong.to(torch.int32), aligned[wrong])
        self.written.append(part)
        self.aligned_sum += int(aligned.sum())
        self.hardened_sum += int(self._words(hardened).sum())
        target.copy_(hardened)

    def follow(self, matrix: Tensor) -> bool:
        """Look at the weight where it is now; False when it is not the same kind of tensor any more."""
        same = (matrix.shape, matrix.dtype, matrix.device) == (
            self.matrix.shape,
            self.matrix.dtype,
            self.matrix.device,
        )
        if same:
            self.matrix = matrix
        return same

    def unchanged(self) -> bool:
        """Whether the weight is still what was written."""
        return sum(int(self._words(self.matrix[part]).sum()) for part in self.written) == self.hardened_sum

    def revert(self) -> bool:
        """Restore the rows that were written; True when their bits are the aligned ones again."""
        restored = 0
        for part in self.written:
            rows = self._back(part, self.matrix[part])
            if part.start in self.corrections:
                positions, values = self.corrections[part.start]
                self._words(rows)[positions.long()] = values
            restored += int(self._words(rows).sum())
            self.matrix[part] = rows
        return restored == self.aligned_sum

    def _words(self, rows: Tensor) -> Tensor:
        """The bits of some rows as integers, (words,): eight bytes at a time where every row allows it."""
        size, pitch = rows.element_size(), self.matrix.stride(0)
        wide = all(place % 8 == 0 for place in (size * rows.shape[1], size * pitch, self.matrix.data_ptr()))
        return rows.contiguous().view(-1).view(torch.int64 if wide else INTEGERS[size])

    def _back(self, part: slice, hardened: Tensor) -> Tensor:
        work = scratch("back", hardened.shape, torch.float32, hardened.device).copy_(hardened)
        self.added.take_away(part, work)
        return scratch("returned", hardened.shape, hardened.dtype, hardened.device).copy_(work)
