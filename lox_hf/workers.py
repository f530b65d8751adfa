"""Processes that work side by side on one thread each, and never outlive what started them."""

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

from lox_hf.errors import LoxError


class Workers:
    """Processes for the time of a `with` block.

    They start when there is work. Ctrl-C is for whoever started them, so they do not hear it. They end with the block
    whatever they are doing then, and with the process that started them however that ends.

    Args:
        count: How many.
        begin: Called first in each of them, with `arguments`.
        arguments: Whatever a process can be sent.

    Example:
        >>> with Workers(2) as workers:  # doctest: +SKIP
        ...     workers.submit(pow, 2, 3).result()
        8
    """

    def __init__(self, count: int, begin: Callable[..., None] | None = None, *arguments: Any) -> None:
        # Not forked: threads of torch and of tokenizers do not survive that.
        context = multiprocessing.get_context("spawn")
        self._theirs, self._ours = context.Pipe(duplex=False)
        first = (self._theirs, begin, arguments)
        self._pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=first)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._ours.close()  # which ends them
        self._pool.shutdown(cancel_futures=True)
        self._theirs.close()

    def submit(self, work: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Let one of the processes do some work; it is a function of a module, as it is sent by name."""
        # A process that starts with this signal blocked never gets it; here it is only late.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._pool.submit(work, *arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def result_of(future: "Future[Any]") -> Any:
    """Return what a worker process has made.

    Args:
        future: Its work.

    Returns:
        The result.

    Raises:
        LoxError: If the process ended by itself, or whatever the work raised.
    """
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise LoxError(
            "A worker process ended by itself: its own words, if any, stand above; where memory has run out, pass "
            "fewer workers. What is finished is kept, and the same call goes on."
        ) from error


def hear_warnings(work: Callable[..., Any], *arguments: Any) -> tuple[Any, list[str]]:
    """Do some work, and collect what a user is warned of meanwhile; in another process nobody would hear it.

    Args:
        work: The work.
        arguments: What it takes.

    Returns:
        Its result, and the texts of the warnings.

    Example:
        >>> hear_warnings(warnings.warn, "look")
        (None, ['look'])
    """
    with warnings.catch_warnings(record=True) as heard:
        result = work(*arguments)
    return result, [str(warning.message) for warning in heard if issubclass(warning.category, UserWarning)]


def _begin(theirs: Connection, begin: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with, args=(theirs,), daemon=True).start()
    if begin is not None:
        begin(*arguments)


def _end_with(theirs: Connection) -> None:
    """Wait until the other end of the pipe is closed, by its owner or by its owner's end."""
    theirs.poll(None)
    os._exit(1)
