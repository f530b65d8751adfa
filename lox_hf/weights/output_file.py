"""A file of a folder that is being made: reserved at once, written at any place, flushed behind the work."""

import ctypes
import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lox_hf.errors import OutputError

FLUSH_BYTES = 128 * 2**20
COPY_BYTES = 2**20


class OutputFile:
    """A file of known size, filled at any position by any thread.

    Args:
        path: Where to write.
        size_bytes: Final size; the space is reserved at once, so that a full disk shows before the work. None opens a
            file that is there.
        output: Folder that is being made, for messages.
    """

    def __init__(self, path: Path, size_bytes: int | None, output: Path) -> None:
        self.path, self.output = path, output
        self._fd = os.open(path, os.O_WRONLY | (0 if size_bytes is None else os.O_CREAT), 0o644)
        self._unflushed, self._lock = 0, threading.Lock()
        self._is_written = False
        self._flusher: threading.Thread | None = None
        self._flush_error: OSError | None = None
        try:
            if size_bytes is not None:
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
        self._is_written = True
        self._flush_behind(len(data))

    def flush(self) -> None:
        """Have everything on the disk that was written so far.

        Raises:
            OSError: If the disk did not take it, now or in the background.
        """
        if self._flusher is not None:
            self._flusher.join()
        if self._is_written:
            self._is_written = False
            os.fsync(self._fd)
        if self._flush_error is not None:
            raise self._flush_error

    def close(self) -> None:
        """Flush to disk and close.

        Raises:
            OSError: If the disk did not take everything, now or in the background.
        """
        try:
            self.flush()
        finally:
            os.close(self._fd)

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
    """Reserve the space of a file; file systems that cannot only set its size.

    Not by `posix_fallocate`: where the file system cannot, the C library writes into every block, and reads it before.

    Raises:
        OSError: If there is not so much space.
    """
    if os.fstat(fd).st_size == size_bytes:
        return  # gone on with
    if _FALLOCATE is not None and _FALLOCATE(fd, 0, 0, size_bytes) != 0:
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise OSError(number, os.strerror(number))
    os.ftruncate(fd, size_bytes)


def _find_fallocate() -> Callable[[int, int, int, int], int] | None:
    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None) if sys.platform == "linux" else None
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]
    return call


_FALLOCATE = _find_fallocate()
