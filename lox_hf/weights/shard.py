"""One safetensors file, memory-mapped: its header as written, and its tensors as views that cost no memory."""

import json
import mmap
import os
import shutil
import struct
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lox_hf.errors import CheckpointError, UnsupportedModelError

NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000) if sys.platform == "linux" else 0
"""Nothing is written to the mapping, so a file larger than the memory must not be charged to it."""

DTYPES = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "U16": torch.uint16,
        "U32": torch.uint32,
        "U64": torch.uint64,
        "BOOL": torch.bool,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "C64": torch.complex64,
    }
)


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a file.

    Attributes:
        dtype: Name of the dtype as the format spells it, such as "BF16".
        shape: Shape of the tensor.
        start: First byte, counted from the start of the file.
        stop: Byte after the last.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class ShardLike(Protocol):
    """One safetensors file, wherever it lies."""

    entries: dict[str, Entry]

    @property
    def name(self) -> str:
        """Name of the file."""
        ...

    @property
    def header(self) -> memoryview:
        """The header as written, with its length in front."""
        ...

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        ...

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, as a view where that is possible."""
        ...

    def raw(self, name: str) -> memoryview:
        """Return a tensor's bytes."""
        ...

    def save(self, path: Path) -> None:
        """Write the whole file to disk."""
        ...

    def prefetch(self, name: str) -> None:
        """Hint that a tensor is needed soon."""
        ...

    def release(self, name: str) -> None:
        """Hint that a tensor is not needed any more."""
        ...


class Shard:
    """A safetensors file, validated by the safetensors library and then mapped.

    Args:
        path: The file.

    Raises:
        CheckpointError: If the file is missing, truncated, or not safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt"):  # the library checks header, offsets and length
                pass
            self._fd = os.open(path, os.O_RDONLY)  # stays open for read-ahead
            weakref.finalize(self, os.close, self._fd)
            self._map = map_file(self._fd)
            self.header_bytes = 8 + struct.unpack("<Q", self._map[:8])[0]
            header = json.loads(self._map[8 : self.header_bytes])
        except (SafetensorError, OSError, ValueError, struct.error) as error:
            raise CheckpointError(
                f"Cannot read {path}: {error}. The file is missing, truncated or not safetensors; download it again."
            ) from error
        header.pop("__metadata__", None)
        self.entries = {
            name: Entry(
                item["dtype"],
                tuple(item["shape"]),
                self.header_bytes + item["data_offsets"][0],
                self.header_bytes + item["data_offsets"][1],
            )
            for name, item in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"])
        }

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.path.name

    @property
    def header(self) -> memoryview:
        """The header as written, with its length in front."""
        return memoryview(self._map)[: self.header_bytes]

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return len(self._map)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor as a view of the mapped file.

        Raises:
            UnsupportedModelError: If torch has no dtype for it.
        """
        entry = self.entries[name]
        return view(self._map, entry, entry.start, f"{name} in {self.path}")

    def raw(self, name: str) -> memoryview:
        """Return a tensor's bytes without copying them."""
        entry = self.entries[name]
        return memoryview(self._map)[entry.start : entry.stop]

    def save(self, path: Path) -> None:
        """Copy the whole file."""
        shutil.copyfile(self.path, path)

    def prefetch(self, name: str) -> None:
        """Ask the kernel to read a tensor's pages ahead; unlike madvise, this call lets other threads run."""
        entry = self.entries[name]
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, entry.start, entry.stop - entry.start, os.POSIX_FADV_WILLNEED)

    def release(self, name: str) -> None:
        """Let go of a tensor's pages: they stay in the page cache but no longer count as this process's memory."""
        entry = self.entries[name]
        start = entry.start // mmap.PAGESIZE * mmap.PAGESIZE
        if entry.stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, entry.stop - start)


def map_file(fd: int) -> mmap.mmap:
    """Map an open file whole; nothing that is written to the mapping reaches the file."""
    return mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE | NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def view(mapped: mmap.mmap | None, entry: Entry, offset: int, label: str) -> Tensor:
    """Return a tensor as a view of a mapped file.

    Args:
        mapped: The mapping; None for a tensor without numbers.
        entry: Dtype and shape of the tensor.
        offset: Where it begins in the mapping.
        label: How messages call it.

    Returns:
        The view.

    Raises:
        UnsupportedModelError: If torch has no dtype for it.
    """
    if entry.dtype not in DTYPES:
        raise UnsupportedModelError(f"{label} is stored as {entry.dtype}, which is not supported.")
    dtype = DTYPES[entry.dtype]
    if mapped is None or entry.start == entry.stop:
        return torch.empty(entry.shape, dtype=dtype)
    count = (entry.stop - entry.start) // dtype.itemsize
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset).view(entry.shape)
