"""A folder that appears whole or not at all: written beside its place, flushed to disk, published by one rename."""

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors import SafetensorError

from lox_hf.errors import OutputError

FLUSH_BYTES = 128 * 2**20
COPY_BYTES = 2**20


class OutputFile:
    """A file of known size, filled at any position by any thread.

    Args:
        path: Where to write.
        size_bytes: Final size; the space is reserved at once, so that a full disk shows before the work.
        output: Folder that is being made, for messages.
    """

    def __init__(self, path: Path, size_bytes: int, output: Path) -> None:
        self.path, self.output = path, output
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._unflushed, self._lock = 0, threading.Lock()
        self._flusher: threading.Thread | None = None
        self._flush_error: OSError | None = None
        try:
            _reserve(self._fd, size_bytes)
        except OSError:
            os.close(self._fd)
            raise

    def write(self, data: memoryview, position: int) -> None:
        """Write bytes at a position, in pieces that the page cache takes without stalling.

        Raises:
            OutputError: If the disk does not take them.
        """
        data = data.cast("B")
        with output_errors(self.output):
            for start in range(0, len(data), COPY_BYTES):
                piece, done = data[start : start + COPY_BYTES], 0
                while done < len(piece):
                    done += os.pwrite(self._fd, piece[done:], position + start + done)
        self._flush_behind(len(data))

    def close(self) -> None:
        """Flush to disk and close.

        Raises:
            OSError: If the disk did not take everything, now or in the background.
        """
        if self._flusher is not None:
            self._flusher.join()
        try:
            os.fsync(self._fd)
        finally:
            os.close(self._fd)
        if self._flush_error is not None:
            raise self._flush_error

    def _flush_behind(self, count: int) -> None:
        """Let the disk work while the processor does: start a flush in the background every now and then."""
        with self._lock:
            self._unflushed += count
            busy = self._flusher is not None and self._flusher.is_alive()
            if self._unflushed < FLUSH_BYTES or busy:
                return
            self._unflushed = 0
            self._flusher = threading.Thread(target=self._flush, daemon=True)
            self._flusher.start()

    def _flush(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:  # the kernel tells of it once only, so it must be kept
            self._flush_error = error


class FolderWriter:
    """The output folder while it is not published: `.NAME.lox-partial` beside it, locked against a second run.

    Use as a context manager: leaving it without `publish` removes everything. What a killed run left is removed by
    the next one.

    Args:
        output_dir: Folder to publish; it must not exist, or be empty.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.output = Path(output_dir).expanduser().absolute()
        self.partial = self.output.parent / f".{self.output.name}.lox-partial"
        self._files: list[OutputFile] = []
        self._lock_fd = -1
        self._published = False

    def check(self, needed_bytes: int, inputs: list[Path]) -> None:
        """Check that the output can be written, before any work.

        Args:
            needed_bytes: Bytes that will be written.
            inputs: Folders that are read.

        Raises:
            OutputError: If the output exists, is an input or lies in one, cannot be written, or the disk is too full.
        """
        for folder in inputs:
            if self.output == folder.absolute() or folder.resolve() in (
                self.output.resolve(),
                *self.output.resolve().parents,
            ):
                raise OutputError(
                    f"The output {self.output} is an input or lies inside one, {folder}: choose another folder."
                )
        is_link = self.output.is_symlink()  # a folder cannot be renamed over a link
        if is_link or (self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir()))):
            raise OutputError(f"The output {self.output} exists: choose another folder, or remove it first.")
        parent = _existing_parent(self.output)
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"The output {self.output} cannot be written: no write permission in {parent}.")
        free = shutil.disk_usage(parent).free + _allocated_bytes(self.partial)  # what a killed run left is removed
        if free < needed_bytes:
            raise OutputError(
                f"The disk of {parent} is too full for {self.output}: {needed_bytes / 1e9:.2f} GB are needed, "
                f"{free / 1e9:.2f} GB free."
            )

    def __enter__(self) -> Self:
        with output_errors(self.output):
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self.partial.mkdir(exist_ok=True)
            self._lock_fd = os.open(self.partial, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(self._lock_fd)
                raise OutputError(
                    f"Another run is writing {self.output}: wait for it, or choose another folder."
                ) from error
            for stale in self.partial.iterdir():
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            with suppress(OSError):
                file.close()
        if not self._published:  # otherwise a folder of this name is another run's
            shutil.rmtree(self.partial, ignore_errors=True)
        os.close(self._lock_fd)

    def create(self, name: str, size_bytes: int) -> OutputFile:
        """Create a file of the folder with its space reserved.

        Args:
            name: Relative path.
            size_bytes: Final size.

        Returns:
            The open file.

        Raises:
            OutputError: If the disk is full or read-only.
        """
        with output_errors(self.output):
            path = self.partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            file = OutputFile(path, size_bytes, self.output)
        self._files.append(file)
        return file

    def write(self, name: str, data: bytes) -> None:
        """Write a small file of the folder.

        Args:
            name: Relative path.
            data: Its content.

        Raises:
            OutputError: If the disk is full or read-only.
        """
        self.create(name, len(data)).write(memoryview(data), 0)

    def copy(self, source: Path, name: str) -> None:
        """Copy a file into the folder.

        Args:
            source: File to copy; links are followed.
            name: Relative path.

        Raises:
            OutputError: If the disk is full or read-only.
        """
        file = self.create(name, source.stat().st_size)
        with source.open("rb") as content:
            position = 0
            while piece := content.read(COPY_BYTES):
                file.write(memoryview(piece), position)
                position += len(piece)

    def publish(self) -> Path:
        """Flush everything to disk and rename the folder to its place.

        Returns:
            The published folder.

        Raises:
            OutputError: If the disk is full, or the output has appeared in the meantime.
        """
        with output_errors(self.output):
            while self._files:
                self._files.pop().close()
            for path in sorted(self.partial.rglob("*"), reverse=True):  # files that others wrote, and folders
                _flush_path(path)
            os.fsync(self._lock_fd)
            os.rename(self.partial, self.output)
            self._published = True
            _flush_path(self.output.parent)
        return self.output


@contextmanager
def output_errors(output: Path) -> Iterator[None]:
    """Turn the system's errors, and those of safetensors writing a file, into `OutputError` in words.

    Args:
        output: Folder that is being made.

    Yields:
        Nothing.

    Raises:
        OutputError: In place of an error of the system.
    """
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        reasons = {
            errno.ENOSPC: "the disk is full",
            errno.EROFS: "the disk is read-only",
            errno.EACCES: "no write permission",
        }
        reason = reasons.get(getattr(error, "errno", None) or 0, str(error))
        raise OutputError(f"Cannot write {output}: {reason}. Nothing was published.") from error


def _reserve(fd: int, size_bytes: int) -> None:
    """Reserve the space of a file; file systems that cannot only set its size."""
    try:
        if size_bytes and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size_bytes)
            return
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
    os.ftruncate(fd, size_bytes)


def _flush_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _allocated_bytes(folder: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*")) if folder.is_dir() else 0


def _existing_parent(path: Path) -> Path:
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    return parent
