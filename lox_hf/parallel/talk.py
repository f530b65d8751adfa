"""What processes say to each other: a few words, through torch's key-value store alone.

A collective would hang where a process is lost. So may the store, where the machine that holds it is lost: one thread
alone talks to it, and nobody waits for that thread longer than `LOST_AFTER_S`. Only silence is noticed: a process that
is stuck in a call still shows that it is there.
"""

import itertools
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from lox_hf.errors import DistributedError

BEAT_S = 1.0
"""How often a process shows that it is there, and looks at the others."""
LOST_AFTER_S = 60.0
"""A process that has shown nothing for so long is taken for lost."""
POLL_S = 0.02
_FAILED = "failed"
_REMEDY = "If the output is not there, nothing was published, and the same command goes on from what is finished."


class Talk:
    """One process's end of it.

    Args:
        rank: Number of this process.
        size: Number of processes.
        store: What they share; used by the thread alone.
        lost_after_s: Seconds of silence after which a process, or the store, is taken for lost.

    Attributes:
        failure: What is known of a process that failed or was lost; empty where nothing is.
        is_committed: What is being done is brought to its end, whatever becomes of the others.
        is_ending: This process is about to leave.
    """

    def __init__(self, rank: int, size: int, store: Any, lost_after_s: float) -> None:
        self.rank, self.size, self._store, self._lost_after_s = rank, size, store, lost_after_s
        self.failure, self.is_committed, self.is_ending = "", False, False
        self._requests: queue.SimpleQueue[Callable[[Any], object]] = queue.SimpleQueue()
        self._awaited: list[str] = []
        self._answers: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()
        self._wake, self._patience_s = threading.Event(), 0.0
        self._answered_at = time.monotonic()
        self._watched = [other for other in (range(size) if rank == 0 else [0]) if other != rank]
        self._seen = dict.fromkeys(self._watched, (b"", time.monotonic()))
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin to talk."""
        self._thread.start()

    def end(self, patience_s: float) -> None:
        """Say good-bye; process 0 may hold the store, so it waits for the others, but not for long."""
        self._patience_s, self.is_ending = patience_s, True
        self._wake.set()
        self._thread.join(min(patience_s, self._lost_after_s) + BEAT_S)

    def check(self) -> None:
        """Raise where something is known, or where the store has not answered for long.

        Raises:
            DistributedError: In that case.
        """
        if not self.failure and time.monotonic() - self._answered_at > self._lost_after_s:
            self.failure = _store_lost(f"no answer for {self._lost_after_s:.0f} s.")
        if self.failure:
            raise DistributedError(self.failure)

    def fail(self, text: str) -> str:
        """Leave a word for the others, which counts where it is the first; return another one's, if that was."""
        self._ask(lambda store: store.compare_set(_FAILED, "", text))
        self._until_known(BEAT_S)
        return self.failure if self.failure != text else ""

    def exchange(self, key: str, value: str, keys: list[str]) -> list[bytes]:
        """Put a value at a key, and wait for those at others."""
        self._awaited = keys
        self._ask(lambda store: store.set(key, value))
        while True:
            self.check()
            try:
                return self._answers.get(timeout=POLL_S)
            except queue.Empty:
                continue

    def stopped(self) -> DistributedError:
        """What to raise on a SIGTERM: torchrun sends one to all processes when one of them has ended."""
        self._until_known(2 * BEAT_S)
        return DistributedError(
            self.failure
            or f"Process {self.rank} of {self.size} was told to stop (SIGTERM), as torchrun does when another process "
            f"has ended, or when it is interrupted itself. {_REMEDY}"
        )

    def _until_known(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.failure and self._thread.is_alive() and time.monotonic() < deadline:
            self._wake.set()
            time.sleep(POLL_S)

    def _ask(self, request: Callable[[Any], object]) -> None:
        self._requests.put(request)
        self._wake.set()

    def _run(self) -> None:
        beats, next_beat = itertools.count(), 0.0
        try:
            while not self.is_ending:
                if time.monotonic() >= next_beat:
                    self._store.set(f"beat/{self.rank}", str(next(beats)))
                    self._look()
                    next_beat = time.monotonic() + BEAT_S
                self._serve()
                self._answered_at = time.monotonic()
                self._wake.wait(POLL_S if self._awaited else BEAT_S)
                self._wake.clear()
            self._serve()
            self._leave()
        except RuntimeError as error:
            self.failure = self.failure or _store_lost(str(error).splitlines()[0])

    def _serve(self) -> None:
        """Pass on what this process has to say, and what it waits for."""
        while not self._requests.empty():
            self._requests.get()(self._store)
        if not self.failure and self._store.check([_FAILED]):
            self.failure = self._store.get(_FAILED).decode()
        if self._awaited and self._store.check(self._awaited):
            values = [self._store.get(key) for key in self._awaited]
            self._awaited = []
            self._answers.put(values)

    def _look(self) -> None:
        """See whether the others are there."""
        silent = [] if self.is_committed else [other for other in self._watched if self._is_silent(other)]
        if silent:
            self._store.compare_set(_FAILED, "", _lost(silent, self.size, self._lost_after_s))

    def _is_silent(self, other: int) -> bool:
        key = f"beat/{other}"
        beat = self._store.get(key) if self._store.check([key]) else b""
        if beat != self._seen[other][0]:
            self._seen[other] = beat, time.monotonic()
        is_silent = time.monotonic() - self._seen[other][1] > self._lost_after_s
        return is_silent and not self._store.check([f"left/{other}"])

    def _leave(self) -> None:
        self._store.set(f"left/{self.rank}", "")
        deadline = time.monotonic() + self._patience_s
        everybody = [f"left/{other}" for other in range(self.size)]
        while self.rank == 0 and not self._store.check(everybody) and time.monotonic() < deadline:
            time.sleep(POLL_S)


def _lost(ranks: list[int], size: int, seconds: float) -> str:
    names = ", ".join(map(str, ranks))
    return (
        f"Process {names} of {size} has shown nothing for {seconds:.0f} s: it was killed, its machine was lost, or it "
        f"never came here. {_REMEDY}"
    )


def _store_lost(reason: str) -> str:
    return (
        "The connection to the other processes was lost (process 0, its machine or the launcher has ended): "
        f"{reason.rstrip('.')}. {_REMEDY}"
    )
