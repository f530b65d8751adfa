"""Where tensors come from: a checkpoint folder, or tensors in memory; under checkpoint names throughout."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lox_hf.errors import CheckpointError, listing
from lox_hf.weights.shard import DTYPES, Shard, ShardLike

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor that has not been read.

    Attributes:
        shape: Shape of the tensor.
        dtype: Its dtype; None where torch has none for the stored format.
        stored: Name of the stored dtype, such as "bfloat16" or "F4".
        read_as: Dtype that it is read in; None where that is the stored one.
        scale_of: The weight whose numbers or inputs this scales; empty for a tensor of its own.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    stored: str
    read_as: torch.dtype | None = None
    scale_of: str = ""

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor; one byte an element where torch does not know the format."""
        return math.prod(self.shape) * (self.dtype.itemsize if self.dtype else 1)


class WeightSource(Protocol):
    """Tensors by checkpoint name, read one at a time."""

    label: str

    def infos(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every tensor, in file order."""
        ...

    def get(self, name: str) -> Tensor:
        """Return one tensor, as a view where that is possible."""
        ...

    def prefetch(self, name: str) -> None:
        """Hint that a tensor is needed soon."""
        ...

    def release(self, name: str) -> None:
        """Hint that a tensor is not needed any more."""
        ...


class ShardedSource:
    """The tensors of safetensors files.

    Args:
        shards: The files, in order.
        label: How messages call the model.
    """

    def __init__(self, shards: Sequence[ShardLike], label: str) -> None:
        self.shards, self.label = list(shards), label
        self._shard_of = {name: shard for shard in self.shards for name in shard.entries}

    def infos(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every tensor, in file order."""
        return {
            name: TensorInfo(
                shard.entries[name].shape,
                DTYPES.get(shard.entries[name].dtype),
                stored_name(shard.entries[name].dtype),
            )
            for name, shard in self._shard_of.items()
        }

    def get(self, name: str) -> Tensor:
        """Return a tensor, as a view of a mapped file."""
        return self.stored(name)

    def stored(self, name: str) -> Tensor:
        """Return a tensor as the file holds it, whatever its numbers stand for."""
        return self._shard_of[name].tensor(name)

    def raw(self, name: str) -> memoryview:
        """Return a tensor's bytes without copying them."""
        return self._shard_of[name].raw(name)

    def prefetch(self, name: str) -> None:
        """Have a tensor on its way."""
        self._shard_of[name].prefetch(name)

    def release(self, name: str) -> None:
        """Let go of a tensor."""
        self._shard_of[name].release(name)

    def shard_of(self, name: str) -> ShardLike:
        """Return the file that holds a tensor."""
        return self._shard_of[name]

    def within(self, shards: Sequence[ShardLike]) -> "ShardedSource":
        """Return the tensors of these files alone: copies of some of this model's."""
        return ShardedSource(shards, self.label)

    def check_index(self, folder: Path) -> None:
        """Check that the index names every tensor's file, and no other.

        Args:
            folder: Folder with the index; a single file has none.

        Raises:
            CheckpointError: If it does not match the shards.
        """
        if [shard.name for shard in self.shards] == [WEIGHTS_NAME]:
            return
        weight_map = read_json(folder / INDEX_NAME)["weight_map"]
        problems = [
            f"{name}: the index says {shard}, the file does not hold it"
            for name, shard in weight_map.items()
            if name not in self._shard_of or self._shard_of[name].name != shard
        ]
        problems += [
            f"{name}: in {self._shard_of[name].name}, but not in the index"
            for name in self._shard_of
            if name not in weight_map
        ]
        if problems:
            raise CheckpointError(
                f"The index of {self.label} does not match its shards: {len(problems)} tensors differ. "
                + listing(problems)
                + " Download the checkpoint again, or save it again with save_pretrained."
            )


class CheckpointSource(ShardedSource):
    """The safetensors files of a checkpoint folder.

    Args:
        folder: Folder with `model.safetensors`, or shards and their index.
        label: How messages call it, such as "aligned 'org/model'".

    Raises:
        CheckpointError: If there are no safetensors files, one is damaged, or the index does not match the shards.
    """

    def __init__(self, folder: Path, label: str) -> None:
        super().__init__([Shard(folder / name) for name in shard_names(folder, label)], label)
        self.check_index(folder)


class DictSource:
    """Tensors that are in memory already.

    Args:
        tensors: Tensors by checkpoint name.
        label: How messages call it.
    """

    def __init__(self, tensors: Mapping[str, Tensor], label: str) -> None:
        self.tensors, self.label = tensors, label

    def infos(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every tensor."""
        return {
            name: TensorInfo(tuple(t.shape), t.dtype, str(t.dtype).removeprefix("torch."))
            for name, t in self.tensors.items()
        }

    def get(self, name: str) -> Tensor:
        """Return the tensor itself."""
        return self.tensors[name]

    def prefetch(self, name: str) -> None:
        """Do nothing: the tensor is there."""

    def release(self, name: str) -> None:
        """Do nothing: the tensor is the caller's."""


def shard_names(folder: Path, label: str, there: Collection[str] | None = None) -> list[str]:
    """Names of a checkpoint's safetensors files: the single file, or the shards in the order of the index.

    Args:
        folder: Checkpoint folder.
        label: How messages call it.
        there: Names of the files that there are; None takes those in the folder.

    Returns:
        File names.

    Raises:
        CheckpointError: If there are none, with the reason.
    """
    if there is None:
        there = {path.name for path in folder.glob("*") if path.is_file()}
    if WEIGHTS_NAME in there:
        return [WEIGHTS_NAME]
    if INDEX_NAME in there:
        weight_map = read_json(folder / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not {type(name) for name in weight_map.values()} == {str}:
            raise CheckpointError(
                f"The index of {label}, {folder / INDEX_NAME}, has no weight_map from tensors to files."
            )
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
        missing = [name for name in names if name not in outside and name not in there]
        if outside or missing:
            raise CheckpointError(
                f"The index of {label} names files that are not in {folder}: {listing(outside + missing)}"
            )
        return names
    if ADAPTER_CONFIG in there:
        raise CheckpointError(
            f"{label} is a PEFT adapter; a full checkpoint is needed here. Load it with its base model, and save what "
            "merge_and_unload() returns."
        )
    pickles = sorted(name for name in there if Path(name).suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{label} has pickle files only ({listing(pickles)}), which can run code when they are read. Convert it "
            "once: load it with AutoModelForCausalLM.from_pretrained and save it with save_pretrained, which writes "
            "safetensors."
        )
    raise CheckpointError(f"{label} has no {WEIGHTS_NAME} and no {INDEX_NAME} in {folder}.")


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Args:
        path: The file.

    Returns:
        The object.

    Raises:
        CheckpointError: If the file is missing or does not hold a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"Cannot read {path}: {error}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"Cannot read {path}: expected a JSON object, got {type(data).__name__}.")
    return data


def stored_name(safetensors_dtype: str) -> str:
    """Torch's name of a safetensors dtype where there is one, such as "bfloat16" for "BF16"."""
    dtype = DTYPES.get(safetensors_dtype)
    return str(dtype).removeprefix("torch.") if dtype is not None else safetensors_dtype
