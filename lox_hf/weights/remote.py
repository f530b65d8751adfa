"""A checkpoint on the Hub, read by ranges: the headers first, then single tensors into temporary files."""

import mmap
import os
import tempfile
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lox_hf.errors import CheckpointError
from lox_hf.hub_files import CHECKPOINT_FILES, Resolved, find_repository
from lox_hf.weights.output_file import output_errors
from lox_hf.weights.ranges import RemoteFile
from lox_hf.weights.shard import Entry, Shard, map_file, view
from lox_hf.weights.source import CheckpointSource, ShardedSource, shard_names

CONNECTIONS = 4
FIRST_READ_BYTES = 2**16
LONGEST_HEADER_BYTES = 100_000_000
"""What the safetensors format allows; a longer one is damage."""


@dataclass(frozen=True)
class Part:
    """A tensor in a temporary file without a name, which ends with the last view of it."""

    mapped: mmap.mmap | None


class RemoteShard:
    """A safetensors file on the Hub: its header is here, its tensors come one by one.

    Args:
        file: The file.
        pool: Threads that read ahead.
        work_dir: Folder for the tensors in work.

    Raises:
        CheckpointError: If the file is missing, truncated, or not safetensors.
    """

    def __init__(self, file: RemoteFile, pool: ThreadPoolExecutor, work_dir: Path) -> None:
        self.file, self._pool, self._work_dir = file, pool, work_dir
        header = _read_header(file)
        self.header, self.size_bytes = memoryview(header), file.size_bytes
        self.entries = _entries(file, header)
        self._parts: dict[str, Future[Part]] = {}
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.file.name

    def tensor(self, name: str) -> Tensor:
        """Return a tensor as a view of its temporary file; it is read now if it was not before."""
        mapped, entry = self._part(name).result().mapped, self.entries[name]
        return view(mapped, entry, 0, f"{name} in {self.file.label}")

    def raw(self, name: str) -> memoryview:
        """Return a tensor's bytes."""
        mapped = self._part(name).result().mapped
        return memoryview(mapped if mapped is not None else b"")

    def save(self, path: Path) -> None:
        """Write the whole file to disk."""
        self.file.save(path)

    def prefetch(self, name: str) -> None:
        """Begin to read a tensor in the background."""
        self._part(name)

    def release(self, name: str) -> None:
        """Let go of a tensor: its file ends with the last view of it."""
        with self._lock:
            self._parts.pop(name, None)

    def _part(self, name: str) -> "Future[Part]":
        with self._lock:
            if name not in self._parts:
                self._parts[name] = self._pool.submit(self._read, self.entries[name])
            return self._parts[name]

    def _read(self, entry: Entry) -> Part:
        if entry.start == entry.stop:
            return Part(None)
        with output_errors(self._work_dir), tempfile.TemporaryFile(dir=self._work_dir, buffering=0) as file:
            for piece in self.file.pieces(entry.start, entry.stop):
                file.write(piece)
            if os.fstat(file.fileno()).st_size != entry.stop - entry.start:
                raise CheckpointError(f"Cannot read {self.file.label}: it ends in the middle of a tensor.")
            return Part(map_file(file.fileno()))


class RemoteSource(ShardedSource):
    """The safetensors files of a model on the Hub, at one commit, in constant memory and with little disk.

    Args:
        repo_id: Hub id.
        revision: Revision on the Hub; it is resolved to its commit first.
        token: Hub token; None uses the stored login.
        label: How messages call the model; None takes its id.
        work_dir: Folder for the tensors in work; None takes the one for temporary files.
        files: Patterns of the small files that are wanted.

    Attributes:
        resolved: The folder of small files, and the commit.
        shards: The files.

    Raises:
        CheckpointError: If there is no such model, it has no safetensors files, or they cannot be read.

    Example:
        >>> source = RemoteSource("org/aligned")  # doctest: +SKIP
        >>> source.get("model.norm.weight").shape  # doctest: +SKIP
        torch.Size([4096])
    """

    def __init__(
        self,
        repo_id: str,
        revision: str | None = None,
        token: str | bool | None = None,
        *,
        label: str | None = None,
        work_dir: str | Path | None = None,
        files: list[str] = CHECKPOINT_FILES,
    ) -> None:
        self.resolved, there = find_repository(repo_id, revision=revision, token=token, files=files)
        label, folder = label or f"'{repo_id}'", Path(work_dir or tempfile.gettempdir())
        commit = self.resolved.reference.revision or ""
        pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="lox-hf-hub")
        weakref.finalize(self, pool.shutdown, wait=False, cancel_futures=True)
        names = shard_names(self.resolved.folder, label, there)
        super().__init__(
            [RemoteShard(RemoteFile(repo_id, name, commit, token), pool, folder) for name in names], label
        )
        self.check_index(self.resolved.folder)


def open_remote(
    repo_id: str | Path,
    revision: str | None,
    token: str | bool | None,
    *,
    label: str,
    work_dir: Path,
    files: list[str] = CHECKPOINT_FILES,
) -> tuple[Resolved, ShardedSource]:
    """Open a model on the Hub where it is; in the Hub's cache, where all its weights are there already.

    Args:
        repo_id: Hub id.
        revision: Revision on the Hub.
        token: Hub token; None uses the stored login.
        label: How messages call the model.
        work_dir: Folder for the tensors in work.
        files: Patterns of the small files that are wanted.

    Returns:
        The folder of small files with the commit, and the tensors.

    Raises:
        CheckpointError: If there is no such model, it has no safetensors files, or they cannot be read.
    """
    resolved, there = find_repository(repo_id, revision=revision, token=token, files=files)
    if all((resolved.folder / name).is_file() for name in shard_names(resolved.folder, label, there)):
        return resolved, CheckpointSource(resolved.folder, label)
    commit = resolved.reference.revision
    return resolved, RemoteSource(str(repo_id), commit, token, label=label, work_dir=work_dir, files=files)


def _read_header(file: RemoteFile) -> bytes:
    """The header with its length in front; most fit into the first request."""
    found = b"".join(file.pieces(0, FIRST_READ_BYTES))
    length = 8 + int.from_bytes(found[:8], "little")
    if len(found) < 8 or length > min(file.size_bytes, LONGEST_HEADER_BYTES):
        raise CheckpointError(f"Cannot read {file.label}: the file is truncated or not safetensors.")
    if length > len(found):
        found += b"".join(file.pieces(len(found), length))
    return found[:length]


def _entries(file: RemoteFile, header: bytes) -> dict[str, Entry]:
    """Have the safetensors library check the header against the file's length: on a file that is a hole after it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.safetensors"
        with path.open("wb") as hollow:
            hollow.write(header)
            hollow.truncate(file.size_bytes)
        try:
            return Shard(path).entries
        except CheckpointError as error:
            raise CheckpointError(
                f"Cannot read {file.label}: {error.__cause__}. The file is truncated or not safetensors."
            ) from error
