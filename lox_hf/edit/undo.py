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
BLOCK = 256
"""Entries whose positions within are a byte."""
FAR = -128
"""Stands for a step that a signed byte does not hold."""


@dataclass(frozen=True)
class Corrections:
    """Entries of some rows that do not round back, in little more than two bytes each, as there are many of them.

    Attributes:
        counts: How many there are in each block of 256 entries, from the first to the last one that has any.
        places: Where each is in its block.
        steps: How far the aligned bits are from the returned ones, as integers; `FAR` where a byte is too short.
        far: The aligned bits of these.
    """

    counts: Tensor
    places: Tensor
    steps: Tensor
    far: Tensor

    @classmethod
    def of(cls, words: Tensor, aligned: Tensor, different: Tensor, size: int) -> "Corrections":
        """Pick entries out of words, which are as wide or several times wider.

        Args:
            words: Which words of the rows differ, (k,), ascending.
            aligned: Their aligned bits, (k,), of an integer dtype.
            different: Which of the bits differ from those that are returned, (k,).
            size: Bytes of an entry.

        Returns:
            The entries that differ.
        """
        in_word = aligned.element_size() // size
        wanted, found = (bits.view(INTEGERS[size]).view(-1, in_word) for bits in (aligned, aligned ^ different))
        word, place = (wanted != found).nonzero(as_tuple=True)
        entries, wanted = words[word] * in_word + place, wanted[word, place]
        steps = wanted.long() - found[word, place].long()
        is_far = steps.abs() > -FAR - 1
        return cls(
            counts=torch.bincount(entries // BLOCK).to(torch.int16),
            places=(entries % BLOCK).to(torch.uint8),
            steps=steps.masked_fill_(is_far, FAR).to(torch.int8),
            far=wanted[is_far],
        )

    def put_into(self, rows: Tensor) -> None:
        """Turn returned rows, which are contiguous, into the aligned ones."""
        bits, counts = rows.view(self.far.dtype).view(-1), self.counts.long()
        blocks = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        entries = blocks * BLOCK + self.places.long()
        aligned = bits[entries] + self.steps
        aligned[self.steps == FAR] = self.far
        bits[entries] = aligned


@dataclass
class Undo:
    """The way back for one matrix.

    Attributes:
        matrix: View of the live weight.
        added: What was added to it, up to rounding.
        name: Checkpoint name of the tensor.
        number: Number of the matrix in a stack.
        written: Slices of rows that were written.
        corrections: By first row of a slice: its entries that do not round back.
        aligned_sum: Checksum of the aligned bits.
        hardened_sum: Checksum of the hardened bits.
    """

    matrix: Tensor
    added: LowRankPart | FullPart
    name: str = ""
    number: int = 0
    written: list[slice] = field(default_factory=list)
    corrections: dict[int, "Corrections"] = field(default_factory=dict)
    aligned_sum: int = 0
    hardened_sum: int = 0

    def write(self, part: slice, hardened: Tensor) -> None:
        """Put hardened rows in place and keep what is needed to undo it."""
        target = self.matrix[part]
        aligned, returned = self._words(target), self._words(self._back(part, hardened))
        different = torch.bitwise_xor(aligned, returned, out=returned)  # in place: the returned rows have served
        wrong = different.nonzero().squeeze(1)
        if len(wrong):
            size = target.element_size()
            self.corrections[part.start] = Corrections.of(wrong, aligned[wrong], different[wrong], size)
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
                self.corrections[part.start].put_into(rows)
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
