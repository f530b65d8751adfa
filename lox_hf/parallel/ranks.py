"""Processes that share one piece of work: who they are, what each has to say, and an end for all when one fails.

They talk through torch's key-value store alone, and only a few words each. A collective would hang where a process is
lost; here every wait has an end.
"""

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, Self

import torch

from lox_hf.errors import DistributedError

BEAT_S = 1.0
"""How often a process shows that it is there, and looks at the others."""
LOST_AFTER_S = 60.0
"""A process that has shown nothing for so long is taken for lost."""
MEETING = 5
"""The processes have this many times as long to start up and meet."""
POLL_S = 0.02
_FAILED = "failed"
_REMEDY = "Nothing was published; the same command goes on from what is finished."
_runs = itertools.count()


class Ranks:
    """This process among those that share the work, numbered from 0.

    Inside `with`, an error of one process, its loss, or a SIGTERM raises `DistributedError` in all the others, at
    their next `check` or `gather`.

    Args:
        rank: Number of this process.
        size: Number of processes.
        stores: Two connections to what they share, one for each thread here; None for a process alone.
        lost_after_s: Seconds of silence after which a process is taken for lost.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        stores: tuple[Any, Any] | None = None,
        *,
        lost_after_s: float = LOST_AFTER_S,
    ) -> None:
        self.rank, self.size, self._lost_after_s = rank, size, lost_after_s
        self._store: Any
        self._watched_store: Any
        self._store, self._watched_store = stores or (None, None)
        self._calls = itertools.count()
        self._failure, self.is_leaving = "", False
        self._leaving = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which speaks and publishes for all."""
        return self.rank == 0

    def __enter__(self) -> Self:
        if self._store is not None:
            self._watcher.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.is_leaving = True
        if self._store is None:
            return
        try:
            if error is not None:
                self._store.compare_set(_FAILED, "", self._told(error))
            self._leave(LOST_AFTER_S if error is None else 3 * BEAT_S)
        except RuntimeError:  # the store is gone: there is nobody left to tell
            pass
        finally:
            self._leaving.set()
            self._watcher.join()

    def check(self) -> None:
        """Raise where another process has failed or was lost; costs nothing, so call it often.

        Raises:
            DistributedError: In that case, with what is known of the reason.
        """
        if self._failure:
            raise DistributedError(self._failure)

    def gather(self, value: Any) -> list[Any]:
        """Wait until every process has come here, and return what each has brought.

        Args:
            value: Anything that JSON holds; small.

        Returns:
            The values in the order of the processes.

        Raises:
            DistributedError: If another process has failed or was lost.
        """
        if self._store is None:
            return [value]
        call = next(self._calls)
        keys = [f"{call}/{rank}" for rank in range(self.size)]
        with self._lost_store():
            self._store.set(keys[self.rank], json.dumps(value))
            while not self._store.check(keys):
                self.check()
                time.sleep(POLL_S)
            return [json.loads(self._store.get(key)) for key in keys]

    def stopped(self) -> DistributedError:
        """What to raise on a SIGTERM: torchrun sends one to all processes when one of them has ended."""
        with self._lost_store():
            if self._store.check([_FAILED]):
                return DistributedError(self._store.get(_FAILED).decode())
        return DistributedError(
            f"Process {self.rank} of {self.size} was told to stop (SIGTERM), as torchrun does when another process "
            f"has ended. {_REMEDY}"
        )

    def _told(self, error: BaseException) -> str:
        text = str(error) or type(error).__name__
        return text if isinstance(error, DistributedError) else f"Process {self.rank} of {self.size} failed: {text}"

    def _watch(self) -> None:
        """Show that this process is there, and see whether the others are: in a thread."""
        store = self._watched_store
        watched = [rank for rank in (range(self.size) if self.is_first else [0]) if rank != self.rank]
        seen = dict.fromkeys(watched, (b"", time.monotonic()))
        for beat in itertools.count():
            try:
                store.set(f"beat/{self.rank}", str(beat))
                if store.check([_FAILED]):
                    self._failure = store.get(_FAILED).decode()
                    return
                silent = [rank for rank in watched if self._is_silent(store, rank, seen)]
                if silent:
                    self._failure = _lost(silent, self.size, self._lost_after_s)
                    store.compare_set(_FAILED, "", self._failure)
                    return
            except RuntimeError as error:
                self._failure = _store_lost(error)
                return
            if self._leaving.wait(BEAT_S):
                return

    def _is_silent(self, store: Any, rank: int, seen: dict[int, tuple[bytes, float]]) -> bool:
        beat = store.get(f"beat/{rank}") if store.check([f"beat/{rank}"]) else b""
        if beat != seen[rank][0]:
            seen[rank] = beat, time.monotonic()
        return time.monotonic() - seen[rank][1] > self._lost_after_s and not store.check([f"left/{rank}"])

    def _leave(self, patience_s: float) -> None:
        """Process 0 may hold the store, so it goes last, if the others do not take too long."""
        self._store.set(f"left/{self.rank}", "")
        deadline = time.monotonic() + patience_s
        others = [f"left/{rank}" for rank in range(self.size)]
        while self.is_first and not self._store.check(others) and time.monotonic() < deadline:
            time.sleep(POLL_S)

    @contextmanager
    def _lost_store(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise DistributedError(_store_lost(error)) from error


@contextmanager
def join_ranks(*, lost_after_s: float = LOST_AFTER_S) -> Iterator[Ranks]:
    """Join the processes that `torchrun`, `accelerate launch` or another launcher has started; every one calls this.

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
    from torch import distributed

    ours = not distributed.is_initialized()
    rank, size, stores = _meet(lost_after_s)
    ranks = Ranks(rank, size, stores, lost_after_s=lost_after_s)
    with _sigterm(ranks):
        try:
            with ranks:
                yield ranks
        finally:
            if ours and distributed.is_initialized():
                distributed.destroy_process_group()


def _meet(lost_after_s: float) -> tuple[int, int, tuple[Any, Any]]:
    """Number of this process, how many there are, and two connections to a store of this run's own."""
    from accelerate import PartialState  # knows the launchers
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    patience = timedelta(seconds=MEETING * lost_after_s)
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        # Without this word it takes a machine without an accelerator for a single process.
        state = PartialState(cpu=not torch.accelerator.is_available(), timeout=patience)
        shared = next(iter(rendezvous("env://", timeout=patience)))[0]
        store: Any = PrefixStore(f"lox_hf/{restart}/{next(_runs)}", shared)
        store.set_timeout(timedelta(seconds=lost_after_s))
        return state.process_index, state.num_processes, (store, store.clone())
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"The processes could not meet: {str(error).splitlines()[0]} Start all of them with torchrun."
        ) from error


@contextmanager
def _sigterm(ranks: Ranks) -> Iterator[None]:
    """Turn SIGTERM into an error, so that this process says why it ends and closes its files."""

    def stop(number: int, frame: FrameType | None) -> None:
        if not ranks.is_leaving:  # else it ends anyway, with what it has to say
            raise ranks.stopped()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _lost(ranks: list[int], size: int, seconds: float) -> str:
    names = ", ".join(map(str, ranks))
    return (
        f"Process {names} of {size} has shown nothing for {seconds:.0f} s: it was killed, its machine was lost, or it "
        f"never came here. {_REMEDY}"
    )


def _store_lost(error: RuntimeError) -> str:
    return (
        "The connection to the other processes was lost (process 0 or its machine has ended): "
        f"{str(error).splitlines()[0]} {_REMEDY}"
    )
