"""Checkpoints with float8 weights: each is read as the float32 matrix that its numbers and scales stand for."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lox_hf.core.scaled import FLOAT8, Blocks, ScaledTensor
from lox_hf.errors import NumericsError, UnsupportedModelError, listing
from lox_hf.records import TensorPlan
from lox_hf.weights.folder import group_weights, quantisation
from lox_hf.weights.shard import ShardLike
from lox_hf.weights.source import ShardedSource, TensorInfo

WEIGHT_SCALES = ("_scale_inv", "_scale")
"""What the name of the scales has after that of the weight: either multiplies the stored numbers."""

ZERO_POINTS = "_zero_point"
"""Of an asymmetric scheme, in which a weight is more than its numbers times its scales."""

INPUT_SCALES = ("activation_scale", "input_scale")
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e8m0fnu)


def with_scales(source: ShardedSource, folder: Path) -> ShardedSource:
    """Read the float8 weights of a checkpoint with their scales.

    Args:
        source: The checkpoint's tensors as they are stored.
        folder: Its folder, for `config.json`.

    Returns:
        The tensors as they are meant; `source` itself where none is float8.

    Raises:
        UnsupportedModelError: If scales are missing or in a form that is not read.
    """
    if not any(info.dtype in FLOAT8 for info in source.infos().values()):
        return source
    return ScaledSource(source, quantisation(folder))


def coarse_steps(plans: Iterable[TensorPlan]) -> tuple[str, ...]:
    """Say what float8 does to small additions.

    A stored number stays where it is unless half a step is added to it, so an addition is not blurred but lost.

    Args:
        plans: What is done to each tensor.

    Returns:
        A sentence; none where no float8 weight is edited.
    """
    count = sum(plan.edit and plan.dtype.startswith("float8") for plan in plans)
    if not count:
        return ()
    return (
        f"{count} weights are stored as float8, whose numbers lie 6 % or more apart, so that rounding loses small "
        "additions: what is 10 % of a weight (by norm) is kept almost whole, of 3 % about 80 % are kept, of 1 % about "
        "40 %. Where alignment changed so little, harden a checkpoint in full precision and quantise the result.",
    )


class ScaledSource(ShardedSource):
    """The tensors of safetensors files, float8 weights as the float32 matrices that they stand for.

    Scales are tensors of their own under the names of their files, and belong to their weight. A float8 weight
    without scales, in a checkpoint that is not quantised, is what its numbers say.

    Args:
        source: The tensors as they are stored.
        scheme: The `quantization_config` of the checkpoint; empty where there is none.

    Attributes:
        scales: Name of the scales of each weight that has some.
        blocks: Blocks of each float8 weight.

    Raises:
        UnsupportedModelError: If scales are missing or in a form that is not read.
    """

    def __init__(self, source: ShardedSource, scheme: Mapping[str, Any]) -> None:
        super().__init__(source.shards, source.label)
        self._source, self._scheme = source, scheme
        stored = source.infos()
        weights = {
            name: info
            for name, info in stored.items()
            if info.dtype in FLOAT8 and len(info.shape) in (2, 3) and not name.endswith(ZERO_POINTS)
        }
        self.scales = {name: scale for name in weights if (scale := scale_name(name, stored))}
        self.blocks = {}
        problems = []
        for name, info in weights.items():
            scale = stored[self.scales[name]] if name in self.scales else None
            has_zero_points = name + ZERO_POINTS in stored
            blocks = "it has zero points" if has_zero_points else _blocks(info, scale, scheme)
            if isinstance(blocks, str):
                problems.append(f"{name}: {blocks}")
            else:
                self.blocks[name] = blocks
        if problems:
            raise UnsupportedModelError(
                f"{len(problems)} float8 weights of {self.label} cannot be read with their scales: "
                f"{listing(problems)} Harden a checkpoint in full precision and quantise the result."
            )

    def infos(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every tensor, in file order."""
        infos = dict(super().infos())
        for name in self.blocks:
            infos[name] = replace(infos[name], read_as=torch.float32)
            stem = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
            for scale in (self.scales.get(name), *(stem + ending for ending in INPUT_SCALES)):
                if scale in infos:
                    infos[scale] = replace(infos[scale], scale_of=name)
        return infos

    def get(self, name: str) -> Tensor:
        """Return a tensor; a float8 weight as the float32 matrix that it stands for, which is made row by row."""
        return self.scaled(name) if name in self.blocks else self.stored(name)

    def scaled(self, name: str) -> ScaledTensor:
        """Return a float8 weight.

        Args:
            name: One of `blocks`.

        Returns:
            The weight, with a copy of its scales: the file may be written over while rows are read.

        Raises:
            NumericsError: If a scale is negative or not finite.
        """
        codes, blocks = self.stored(name), self.blocks[name]
        scales = self.stored(self.scales[name]) if name in self.scales else torch.ones(codes.shape[:-2] or 1)
        grid = scales.to(torch.float32, copy=True).reshape(*codes.shape[:-2], -1, -(-codes.shape[-1] // blocks.width))
        if not (grid.isfinite() & (grid >= 0)).all():
            raise NumericsError(f"{self.scales[name]}: a scale is negative, NaN or Inf; check the checkpoint.")
        return ScaledTensor(codes, grid, blocks)

    def prefetch(self, name: str) -> None:
        """Have a tensor on its way, and its scales."""
        for each in self._with_scales(name):
            super().prefetch(each)

    def release(self, name: str) -> None:
        """Let go of a tensor, and of its scales."""
        for each in self._with_scales(name):
            super().release(each)

    def within(self, shards: Sequence[ShardLike]) -> "ScaledSource":
        """Return the tensors of these files alone.

        Args:
            shards: Copies of some of this model's files.

        Returns:
            The tensors.

        Raises:
            UnsupportedModelError: If the scales of a weight lie in another file.
        """
        names = {name for shard in shards for name in shard.entries}
        apart = [name for name, scale in self.scales.items() if (name in names) != (scale in names)]
        if apart:
            raise UnsupportedModelError(
                f"One file of {self.label} is worked on at a time, and {len(apart)} float8 weights have their scales "
                f"in another: {listing(apart, 5)} Harden it into a folder, and push that."
            )
        return ScaledSource(ShardedSource(shards, self.label), self._scheme)

    def _with_scales(self, name: str) -> list[str]:
        return [name, self.scales[name]] if name in self.scales else [name]


def scale_name(weight: str, names: Container[str]) -> str:
    """Return the name of a weight's scales; empty where none of the names is.

    Args:
        weight: Name of the weight.
        names: Names of the checkpoint's tensors.

    Returns:
        The name.
    """
    return next((weight + ending for ending in WEIGHT_SCALES if weight + ending in names), "")


def _blocks(weight: TensorInfo, scale: TensorInfo | None, scheme: Mapping[str, Any]) -> Blocks | str:
    """How a weight is cut into blocks, or why that cannot be said."""
    rows, columns = weight.shape[-2:]
    if scale is None:
        return "it has no scales" if scheme else Blocks(rows, columns, stored=None)
    if scale.dtype not in SCALE_DTYPES:
        return f"its scales are stored as {scale.stored}"
    grid = scale.shape if scale.shape not in ((), (1,)) else (1, 1)
    sides = (0, 0)
    if len(grid) == len(weight.shape) and grid[:-2] == weight.shape[:-2]:
        sides = [_side(*each) for each in zip((rows, columns), grid[-2:], _block_size(scheme), strict=True)]
    if not all(sides):
        return f"scales of shape {scale.shape} do not fit the weight's {weight.shape}"
    powers_of_two = scheme.get("scale_fmt") == "ue8m0" or scale.dtype == torch.float8_e8m0fnu
    return Blocks(*sides, stored=scale.dtype, powers_of_two=powers_of_two)


def _side(size: int, count: int, given: int) -> int:
    """Length of a block along a side of `count` blocks, 0 where none fits; if it is given, the last may be shorter."""
    if given and -(-size // given) == count:
        return given
    return size // count if count and size % count == 0 else 0


def _block_size(scheme: Mapping[str, Any]) -> tuple[int, int]:
    """Size of a block that the config gives; zeros where it gives none."""
    sizes = [scheme.get("weight_block_size"), *(each.get("block_structure") for each in group_weights(scheme))]
    return next((tuple(size) for size in sizes if isinstance(size, list) and len(size) == 2), (0, 0))
