"""A folder that appears whole or not at all: written beside its place, flushed to disk, published by one rename."""

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from lox_hf.errors import OutputError
from lox_hf.weights.output_file import COPY_BYTES, OutputFile, output_errors


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
                if not isinstance(error, BlockingIOError):
                    raise
                several = int(os.environ.get("WORLD_SIZE") or 1) > 1
                raise OutputError(
                    f"Another run is writing {self.output}: wait for it, or choose another folder."
                    + " Processes of one launch share a run by ranks=, from join_ranks()." * several
                ) from error
            try:
                self._take_up()
            except OSError:
                self._give_up()
                os.close(self._lock_fd)
                raise
        return self

    def _take_up(self) -> None:
        """Start with an empty folder."""
        for stale in self.partial.iterdir():
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_all()
        if not self._published:  # otherwise a folder of this name is another run's
            self._give_up()
        os.close(self._lock_fd)

    def _close_all(self) -> None:
        for file in self._files:
            with suppress(OSError):
                file.close()

    def _give_up(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def create(self, name: str, size_bytes: int) -> OutputFile:
        """Create a file of the folder with its space reserved; one of this size that is there is kept as it is.

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
            if path.exists() and path.stat().st_size != size_bytes:
                path.unlink()
            return self._keep(OutputFile(path, size_bytes, self.output))

    def _keep(self, file: OutputFile) -> OutputFile:
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
            self._make_final()
            os.fsync(self._lock_fd)
            os.rename(self.partial, self.output)
            self._published = True
            _flush_path(self.output.parent)
        return self.output

    def _make_final(self) -> None:
        """Take out what is not to be published; here there is nothing."""


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
