"""Processes that share one piece of work: who they are, what each has brought, and an end for all when one fails."""

import itertools
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, Self

import torch

from lox_hf.errors import DistributedError
from lox_hf.parallel.talk import BEAT_S, LOST_AFTER_S, Talk

MEETING = 5
"""The processes have this many times as long to start up and meet as a silent one has."""
_runs = itertools.count()


class Ranks:
    """This process among those that share the work, numbered from 0.

    Inside `with`, an error of one process, its loss, or a SIGTERM raises `DistributedError` in all the others, at
    their next `check`, `gather` or `from_first`.

    Args:
        rank: Number of this process.
        size: Number of processes.
        store: What they share; None for a process alone.
        lost_after_s: Seconds of silence after which a process is taken for lost.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None, *, lost_after_s: float = LOST_AFTER_S) -> None:
        self.rank, self.size = rank, size
        self._calls = itertools.count()
        self._talk = None if store is None else Talk(rank, size, store, lost_after_s)

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which speaks and publishes for all."""
        return self.rank == 0

    def __enter__(self) -> Self:
        if self._talk is not None:
            self._talk.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._talk is None:
            return
        first = "" if error is None else self._tell(error)
        self._talk.end(LOST_AFTER_S if error is None else 3 * BEAT_S)
        if first and isinstance(error, Exception) and not isinstance(error, DistributedError):
            raise DistributedError(first) from error  # what failed here may follow from what failed there

    def check(self) -> None:
        """Raise where another process has failed or was lost; costs nothing, so call it often.

        Raises:
            DistributedError: In that case, with what is known of the reason.
        """
        if self._talk is not None:
            self._talk.check()

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Have the others told of an error in a block at once: before this process takes away what they work on.

        Yields:
            Nothing.
        """
        try:
            yield
        except BaseException as error:
            self._tell(error)
            raise

    def gather(self, value: Any) -> list[Any]:
        """Wait until every process has come here, and return what each has brought.

        Args:
            value: Anything that JSON holds; small.

        Returns:
            The values in the order of the processes.

        Raises:
            DistributedError: If another process has failed or was lost.
        """
        return self._exchange(value, range(self.size))

    def from_first(self, value: Any) -> Any:
        """Return what process 0 has brought here; process 0 does not wait for the others.

        Args:
            value: Anything that JSON holds; small. That of the others is not read.

        Returns:
            The value of process 0.

        Raises:
            DistributedError: If another process has failed or was lost.
        """
        return self._exchange(value, range(1))[0]

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Bring a block to its end whatever becomes of the others: a SIGTERM and losses do not count in it.

        Yields:
            Nothing.

        Raises:
            DistributedError: If another process has failed or was lost before.
        """
        self.check()
        if self._talk is None:
            yield
            return
        self._talk.is_committed = True
        yield

    def _tell(self, error: BaseException) -> str:
        """Leave word of an error here; return what another process has said before, if one has."""
        if self._talk is None:
            return ""
        text = str(error) or type(error).__name__
        if not isinstance(error, DistributedError):
            text = f"Process {self.rank} of {self.size} failed: {text}"
        return self._talk.fail(text)

    def _exchange(self, value: Any, ranks: range) -> list[Any]:
        if self._talk is None:
            return [value]
        call = next(self._calls)
        return [
            json.loads(item)
            for item in self._talk.exchange(f"{call}/{self.rank}", json.dumps(value), [f"{call}/{n}" for n in ranks])
        ]


@contextmanager
def join_ranks(*, lost_after_s: float = LOST_AFTER_S) -> Iterator[Ranks]:
    """Join the processes that `torchrun` or `accelerate launch` has started; every one of them calls this.

    Args:
        lost_after_s: Seconds of silence after which a process is taken for lost.

    Yields:
        This process among them; alone where no launcher has started several.

    Raises:
        DistributedError: Inside, where another process fails, is lost, or does not come.

    Example:
        >>> with join_ranks() as ranks:
        ...     print(ranks.rank, "of", ranks.size)
        0 of 1
    """
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        yield Ranks()
        return
    ranks = _meet(lost_after_s)
    with _sigterm(ranks), ranks:
        yield ranks


def _meet(lost_after_s: float) -> Ranks:
    """This process among the others, with a store of this run's own."""
    from accelerate import PartialState  # knows the launchers
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    patience = timedelta(seconds=MEETING * lost_after_s)
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        # Without this word it takes a machine without an accelerator for a single process.
        state = PartialState(cpu=not torch.accelerator.is_available(), timeout=patience)
        shared = next(iter(rendezvous("env://", timeout=patience)))[0]
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"The processes could not meet: {str(error).splitlines()[0]} Start all of them with torchrun."
        ) from error
    store = PrefixStore(f"lox_hf/{restart}/{next(_runs)}", shared)
    return Ranks(state.process_index, state.num_processes, store, lost_after_s=lost_after_s)


@contextmanager
def _sigterm(ranks: Ranks) -> Iterator[None]:
    """Turn SIGTERM into an error, so that this process says why it ends and closes its files."""
    talk = ranks._talk

    def stop(number: int, frame: FrameType | None) -> None:
        is_failing = sys.exception() is not None  # such as a KeyboardInterrupt, which the launcher follows up
        if talk is not None and not (is_failing or talk.is_ending or talk.is_committed):
            raise talk.stopped()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
