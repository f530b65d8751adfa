"""float8 matrices: numbers of 8 bits, each block of which has a scale; seen as float32, and rounded back."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_map_only

from lox_hf.core.buffers import scratch
from lox_hf.errors import NumericsError

aten = torch.ops.aten
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Blocks:
    """How a matrix is cut into blocks of one scale each, and what a scale may become.

    Attributes:
        height: Rows of a block; those at the lower edge may have fewer.
        width: Columns of a block; those at the right edge may have fewer.
        stored: Dtype of the scales; None where there are none, and each counts as 1.
        powers_of_two: Whether scales are powers of two.
    """

    height: int
    width: int
    stored: torch.dtype | None = torch.float32
    powers_of_two: bool = False

    def scale(self, rows: Tensor, scales: Tensor) -> Tensor:
        """Multiply rows by their scales, in place.

        Args:
            rows: Numbers without scales, (k, n).
            scales: Scales of the blocks of each of these rows, (k, blocks in a row).

        Returns:
            The rows.
        """
        for piece, factor in self._pieces(rows, scales):
            piece.mul_(factor)
        return rows

    def unscale(self, rows: Tensor, scales: Tensor) -> Tensor:
        """Divide rows by their scales, in place; see `scale`."""
        for piece, factor in self._pieces(rows, scales):
            piece.div_(factor)
        return rows

    def largest(self, rows: Tensor) -> Tensor:
        """Return the largest magnitude in each block of rows that begin with a block: (blocks down, blocks across)."""
        full, rest = divmod(len(rows), self.height)
        down = _largest_down(rows[: full * self.height].unflatten(0, (full, self.height)))
        if rest:
            down = torch.cat([down, _largest_down(rows[None, -rest:])])
        return pad(down, (0, -rows.shape[1] % self.width)).unflatten(1, (-1, self.width)).amax(2)

    def of_rows(self, scales: Tensor, rows: Tensor) -> Tensor:
        """Return the scales of the blocks in each of these rows, by their numbers."""
        return scales[rows // self.height]

    def raised(self, wanted: Tensor) -> Tensor:
        """Return the scales that are stored where these float32 ones are wanted."""
        return (torch.exp2(wanted.log2().ceil()) if self.powers_of_two else wanted).to(self.stored).float()

    def _pieces(self, rows: Tensor, scales: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of the rows, cut into blocks, with the scales that go with them: no scale is spread over columns."""
        full, rest = divmod(rows.shape[1], self.width)
        yield rows[:, : full * self.width].unflatten(1, (full, self.width)), scales[:, :full, None]
        if rest:
            yield rows[:, full * self.width :], scales[:, full:]


def _largest_down(blocks: Tensor) -> Tensor:
    """Largest magnitude in each column of each block; not by `abs`, which would copy all of them."""
    return torch.maximum(blocks.amax(1), blocks.amin(1).neg_())


class ScaledTensor(Tensor):
    """A float8 tensor with its scales, to be used as the float32 tensor that it stands for.

    Rows of a matrix, and matrices of a stack, stay as they are stored. They are turned into float32 when they are
    copied into a buffer or subtracted from it, so the whole is never held. Any other operation works on all of its
    numbers in float32. It is read, never written.

    Args:
        codes: The stored numbers, (m, n), or (count, m, n).
        scales: What each block is multiplied by, float32, (blocks down, blocks across), or one such grid a matrix.
        blocks: Size of a block.

    Example:
        >>> stored = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).to(torch.float8_e4m3fn)
        >>> weight = ScaledTensor(stored, torch.tensor([[0.5], [2.0]]), Blocks(1, 2))
        >>> weight[1:] + 1
        tensor([[7., 9.]])
    """

    codes: Tensor
    scales: Tensor
    blocks: Blocks

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, blocks: Blocks) -> Self:
        """Make a tensor without memory of its own."""
        made = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)
        made.codes, made.scales, made.blocks = codes, scales, blocks
        return made

    def __init__(self, codes: Tensor, scales: Tensor, blocks: Blocks) -> None: ...

    def __repr__(self, **_: object) -> str:
        """Say what it is, without its numbers."""
        return f"ScaledTensor(shape={tuple(self.shape)}, stored={self.codes.dtype}, blocks={self.blocks})"

    @classmethod
    def __torch_dispatch__(  # pyrefly: ignore[bad-override]  # torch declares it without its class
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Take rows, take matrices, fill a buffer, or run any other operation on all numbers in float32."""
        first, second, *_ = *args, None, None
        if isinstance(first, ScaledTensor):
            if func is aten.view.default and tuple(args[1]) == tuple(first.shape):
                return ScaledTensor(first.codes, first.scales, first.blocks)
            if func is aten.unbind.int and first.dim() == 3 and not second:
                return first._matrices()
            if func in (aten.slice.Tensor, aten.index_select.default) and first.dim() == 2 and not second:
                return first._rows(func(first.codes, *args[1:]), func(first._numbers(), *args[1:]))
        elif isinstance(second, ScaledTensor) and not kwargs:
            if func is aten.copy_.default and second._fits(args[0]):
                return second._write(args[0])
            if func is aten.sub_.Tensor:
                return func(first, second._write(scratch("float8 rows", second.shape, torch.float32, second.device)))
        plain_args, plain_kwargs = tree_map_only(ScaledTensor, ScaledTensor.dense, (args, kwargs or {}))
        return func(*plain_args, **plain_kwargs)

    def dense(self) -> Tensor:
        """Return the whole as a plain float32 tensor."""
        return self._write(torch.empty(self.shape, dtype=torch.float32, device=self.device))

    def _fits(self, out: Tensor) -> bool:
        return (out.shape, out.dtype, out.device) == (self.shape, self.dtype, self.device)

    def _write(self, out: Tensor) -> Tensor:
        if self.dim() == 3:
            for each, matrix in zip(out, self._matrices(), strict=True):
                matrix._write(each)
            return out
        return self.blocks.scale(upcast(self.codes, out), self.blocks.of_rows(self.scales, self._numbers()))

    def _matrices(self) -> "list[ScaledTensor]":
        pairs = zip(self.codes, self.scales, strict=True)
        return [ScaledTensor(codes, scales, self.blocks) for codes, scales in pairs]

    def _numbers(self) -> Tensor:
        return torch.arange(len(self.codes), device=self.device)

    def _rows(self, codes: Tensor, numbers: Tensor) -> "ScaledTensor":
        """Rows of these numbers, each with scales of its own: they may lie anywhere in a block."""
        return ScaledTensor(codes, self.blocks.of_rows(self.scales, numbers), replace(self.blocks, height=1))


def upcast(codes: Tensor, out: Tensor) -> Tensor:
    """Write float8 numbers in float32; torch reads e4m3fn one by one on a CPU, which takes 15 times as long as this.

    Shifted by 7 bits, sign and magnitude are a float16 whose exponent is smaller by 8. Only NaN would become a number.

    Args:
        codes: float8 numbers.
        out: Where to write, float32 of the same shape.

    Returns:
        `out`.
    """
    if codes.dtype != torch.float8_e4m3fn or not codes.is_cpu or not codes.numel() or _has_nan(codes):
        return out.copy_(codes)
    bits = scratch("float8 bits", codes.shape, torch.int16, codes.device).copy_(codes.view(torch.int8))
    half = bits.bitwise_left_shift_(7).bitwise_and_(~(1 << 14)).view(torch.float16)
    return out.copy_(half).mul_(256)


def _has_nan(codes: Tensor) -> bool:
    """Whether some number has all bits of its magnitude set: the largest of either sign, read as integers."""
    return bool(codes.view(torch.int8).max() == 127 or codes.view(torch.uint8).max() == 255)


def round_rows(rows: Tensor, scales: Tensor, dtype: torch.dtype, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Round rows to float8.

    A block keeps its scale, so that a number that has not changed keeps its bits. Only where one of its numbers is so
    large that the largest float8 is no longer the nearest, the scale is raised: that number becomes the largest.

    Args:
        rows: float32 rows of whole blocks, from the first row of a block on; they are changed.
        scales: Scales of these blocks, float32, (blocks down, blocks across).
        dtype: float8 dtype to round to.
        blocks: Size of a block, and what scales may become.

    Returns:
        float8 rows, and the scales that they are stored with.

    Raises:
        NumericsError: If a number is not finite, or does not fit where there are no scales.
    """
    limits, largest = torch.finfo(dtype), blocks.largest(rows)
    if not largest.isfinite().all():
        raise NumericsError("the result overflows, or the weight contains NaN or Inf; lower alpha, or check it")
    half_spacing = limits.eps * 2.0 ** (math.frexp(limits.max)[1] - 2)
    over = largest > scales * (limits.max + half_spacing)
    if over.any():
        if blocks.stored is None:
            raise NumericsError(f"the result overflows {str(dtype).removeprefix('torch.')}; lower alpha")
        scales = torch.where(over, blocks.raised(largest / limits.max), scales)
    divisors = scales.clamp_min(torch.finfo(torch.float32).tiny)  # a scale of zero has nothing to divide
    blocks.unscale(rows, blocks.of_rows(divisors, torch.arange(len(rows), device=rows.device)))
    return rows.clamp_(limits.min, limits.max).to(dtype), scales
