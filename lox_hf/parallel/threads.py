"""Work over tensors: one thread per core, each with single-threaded kernels, and a progress bar on terminals."""

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

from lox_hf.core.precision import exact_products
from lox_hf.progress import progress_bar

_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

FREE_EVERY_BYTES = 64 * 2**20
"""Tensors between two returns of free memory."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_tensors(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    size_of: Callable[[Item], int],
    num_workers: int | None = None,
    progressbar: bool | None = None,
    description: str = "",
    prepare: Callable[[Item], None] | None = None,
    group_of: Callable[[Item], int] = lambda _: 0,
) -> list[Result]:
    """Run `work` on every item, in each group the largest first so that the threads end together.

    Products of a tall matrix with a few columns scale badly over threads, tensors scale well: hence a thread per
    tensor with kernels on one thread, and products of float32 matrices in float32; both are restored afterwards.

    Args:
        work: Function of one item; it must be safe to run in several threads.
        items: Items.
        size_of: Size of an item in bytes, for the order and the progress bar.
        num_workers: Threads; None takes torch's number of threads.
        progressbar: Show a progress bar on standard error; None shows one on a terminal only.
        description: Text beside the bar.
        prepare: Called with an item some time before its turn, to have its data on the way.
        group_of: Group of an item; a group begins before the next one does.

    Returns:
        Results in the order of `items`.

    Raises:
        BaseException: The first error of `work`; items that have not begun are dropped.
    """
    workers = max(1, min(num_workers or torch.get_num_threads(), len(items)))
    order = sorted(range(len(items)), key=lambda number: (group_of(items[number]), -size_of(items[number])))
    stop, free = threading.Event(), _Freeing()
    with (
        progress_bar(sum(map(size_of, items)), progressbar, description, unit="B") as advance,
        _kernel_threads(1),
        exact_products(),
    ):

        def announce(places: range) -> None:
            for place in places:
                if prepare is not None and place < len(order):
                    prepare(items[order[place]])

        def run(place: int) -> Result:
            if stop.is_set():
                raise CancelledError
            announce(range(place + workers, place + workers + 1))
            number = order[place]
            result = work(items[number])
            free.after(size_of(items[number]))
            advance(size_of(items[number]))
            return result

        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            announce(range(workers))
            futures = {number: pool.submit(run, place) for place, number in enumerate(order)}
            try:
                done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
            finally:
                stop.set()
    for future in done:
        future.result()  # raises the first error, before those of items that were dropped for it
    return [futures[number].result() for number in range(len(items))]


class _Freeing:
    """Gives memory back now and then: after every small tensor it would cost more than the work (page faults)."""

    def __init__(self) -> None:
        self._worked = 0

    def after(self, size_bytes: int) -> None:
        """Count what was worked on; threads may miss each other's, which does no harm."""
        self._worked += size_bytes
        if self._worked >= FREE_EVERY_BYTES:
            self._worked = 0
            return_free_memory()


def return_free_memory() -> None:
    """Give freed buffers back to the system: glibc keeps tens of megabytes per thread otherwise."""
    if _TRIM is not None:
        _TRIM(0)


@contextmanager
def _kernel_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
