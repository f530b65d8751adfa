"""float8 weights on their way to a target: rows are gathered to whole blocks, rounded, and get their scales."""

from dataclasses import replace

import torch
from torch import Tensor

from lox_hf.core.delta import TILE_ELEMENTS
from lox_hf.core.scaled import ScaledTensor, round_rows
from lox_hf.edit.model import Target
from lox_hf.edit.tensor import MatrixSink
from lox_hf.records import TensorPlan
from lox_hf.weights.scaled import ScaledSource
from lox_hf.weights.source import WeightSource


def storing(target: Target, aligned: WeightSource) -> Target:
    """Have float8 weights arrive at a target as they are stored, each together with its scales.

    Args:
        target: Takes rows and bytes in stored dtypes.
        aligned: The aligned tensors.

    Returns:
        A target for `edit_tensors`; `target` itself where no weight is float8.
    """
    return _Storing(target, aligned) if isinstance(aligned, ScaledSource) else target


class _Storing:
    """Scales are handed on with their weight, so nothing is left to do for them by themselves."""

    def __init__(self, target: Target, source: ScaledSource) -> None:
        self._target, self._source = target, source
        self._scales = frozenset(source.scales.values())

    def sink(self, plan: TensorPlan, aligned: Tensor) -> MatrixSink:
        """Return what rounds finished rows and hands them on, and at the end their scales."""
        if plan.name not in self._source.blocks:
            return self._target.sink(plan, aligned)
        stored = self._source.scaled(plan.name)
        rounding = _Rounding(stored, self._target.sink(plan, stored.codes))

        def take(number: int, part: slice, tile: Tensor) -> None:
            rounding.take(number, part, tile)
            if plan.name in self._source.scales and rounding.is_last(number, part):
                before = self._source.stored(self._source.scales[plan.name]).reshape(1, -1)
                after = rounding.scales.reshape(1, -1).to(before.dtype)
                self._target.sink(self._of_scales(plan), before)(0, slice(0, 1), after)

        return take

    def copy(self, plan: TensorPlan) -> None:
        """Hand on a tensor that is not edited, a weight with its scales."""
        if plan.name in self._scales:
            return
        self._target.copy(plan)
        if plan.name in self._source.scales:
            self._target.copy(self._of_scales(plan))

    def _of_scales(self, plan: TensorPlan) -> TensorPlan:
        scales = self._source.scales[plan.name]
        return replace(plan, name=scales, shape=tuple(self._source.stored(scales).shape), edit=False)


class _Rounding:
    """Rows of one weight, rounded as soon as whole blocks of them are there: they come from top to bottom."""

    def __init__(self, stored: ScaledTensor, sink: MatrixSink) -> None:
        self._stored, self._sink = stored, sink
        self._rows, columns = stored.shape[-2:]
        height = stored.blocks.height
        self._capacity = height * max(1, TILE_ELEMENTS // (height * columns))
        self._gathered = torch.empty((min(self._capacity, self._rows), columns), dtype=torch.float32, device="cpu")
        self.scales = stored.scales.reshape(-1, *stored.scales.shape[-2:]).clone()

    def is_last(self, number: int, part: slice) -> bool:
        """Whether these are the last rows of the last matrix."""
        return (number, part.stop) == (len(self.scales) - 1, self._rows)

    def take(self, number: int, part: slice, tile: Tensor) -> None:
        """Take finished rows in float32."""
        if isinstance(tile, ScaledTensor):  # the aligned matrix itself: nothing was added
            self._sink(number, part, tile.codes)
            return
        start = part.start
        while start < part.stop:
            first = start - start % self._capacity
            end = min(first + self._capacity, self._rows)
            stop = min(end, part.stop)
            self._gathered[start - first : stop - first] = tile[start - part.start : stop - part.start]
            if stop == end:
                self._round(number, first, end)
            start = stop

    def _round(self, number: int, first: int, end: int) -> None:
        blocks = self._stored.blocks
        scales = self.scales[number, first // blocks.height : -(-end // blocks.height)]
        codes, scales[:] = round_rows(self._gathered[: end - first], scales, self._stored.codes.dtype, blocks)
        self._sink(number, slice(first, end), codes)
