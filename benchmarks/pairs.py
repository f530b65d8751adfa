"""Read the tensors of two checkpoint folders side by side, by name, with safetensors alone."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


class TensorPairs:
    """Two folders of safetensors shards, cut in any way; reads one tensor of each by name."""

    def __init__(self, first: str | Path, second: str | Path) -> None:
        """Open every shard of both folders."""
        self._stack = ExitStack()
        self._first = self._open(Path(first))
        self._second = self._open(Path(second))

    def __enter__(self) -> TensorPairs:
        """Return the reader."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close every shard."""
        self._stack.close()

    def names(self) -> list[str]:
        """Return the tensor names of the first folder, sorted.

        Raises:
            ValueError: The folders do not hold the same names.
        """
        if self._first.keys() != self._second.keys():
            raise ValueError(f"the folders differ in {sorted(self._first.keys() ^ self._second.keys())}")
        return sorted(self._first)

    def matrices(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor with two or more dims."""
        shapes = {name: tuple(self._first[name].get_slice(name).get_shape()) for name in self.names()}
        return {name: shape for name, shape in shapes.items() if len(shape) > 1}

    def read(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tensor of the first and of the second folder."""
        return self._first[name].get_tensor(name), self._second[name].get_tensor(name)

    def _open(self, folder: Path) -> dict[str, Any]:
        handles = {}
        for file in sorted(folder.glob("*.safetensors")):
            handle = self._stack.enter_context(safe_open(file, framework="pt"))
            handles |= dict.fromkeys(handle.keys(), handle)
        return handles
