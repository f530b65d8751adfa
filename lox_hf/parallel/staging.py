"""Tensors on their way between the host and a device, through pinned buffers, while both go on with their work.

On the CPU the same code copies through plain buffers, and there is nothing to wait for.
"""

import itertools
import queue
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor

from lox_hf.core.delta import tile_slices

BUFFER_BYTES = 64 * 2**20
"""Size of a pinned buffer: large enough for the full speed of the bus, small enough to be made in no time."""
BUFFERS = 3


class _Buffer:
    """Page-locked memory on the host, which a device reads and writes without help; plain memory for the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type != "cpu"
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._copied = torch.get_device_module(device).Event() if self._pinned else None

    def view(self, rows: Tensor) -> Tensor:
        """Return room for rows of this shape and dtype; its last copy must be over."""
        if self._memory.numel() < rows.nbytes:
            size = max(BUFFER_BYTES, rows.nbytes)
            self._memory = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self._pinned)
        return self._memory[: rows.nbytes].view(rows.dtype).view(rows.shape)

    def mark(self, stream: Any) -> None:
        """Remember that a copy has been put on this stream."""
        if self._copied is not None:
            self._copied.record(stream)

    def wait(self) -> None:
        """Wait until that copy is over; others may run meanwhile."""
        if self._copied is not None:
            self._copied.synchronize()


class Stage:
    """Brings tensors to a device on a stream of its own. One thread brings, another one takes over.

    Args:
        device: Where to; with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module = torch.get_device_module(device) if device.type != "cpu" else None
        self._stream = self._module.Stream(device) if self._module else None
        self._buffers = itertools.cycle([_Buffer(device) for _ in range(BUFFERS)])

    @torch.no_grad()
    def bring(self, tensor: Tensor) -> Tensor:
        """Return the tensor on the device: itself where it is there, else a copy that is on its way.

        Args:
            tensor: Any tensor, on the host or on another device.

        Returns:
            A tensor on the device, to be taken over before it is used.
        """
        if tensor.device == self.device:
            return tensor
        with self._module.stream(self._stream) if self._module else nullcontext():
            if tensor.device.type != "cpu":
                return tensor.to(self.device)
            result = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
            self._fill(result.flatten(0, -2), tensor.flatten(0, -2))
            return result

    def ready(self) -> Any:
        """Return an event that comes when all that was brought so far has arrived; None on the CPU."""
        return self._stream.record_event() if self._stream is not None else None

    def take_over(self, arrived: Any, tensors: Iterable[Tensor]) -> None:
        """Have the current stream wait for what was brought, without the host waiting.

        Args:
            arrived: What `ready` returned behind them.
            tensors: All that is used from here on; their memory is not used again before this stream is done with it.
        """
        if self._module is None:
            return
        current = self._module.current_stream(self.device)
        current.wait_event(arrived)
        for tensor in tensors:
            tensor.record_stream(current)

    def _fill(self, target: Tensor, source: Tensor) -> None:
        for part in tile_slices(*source.shape, tile_elements=BUFFER_BYTES // source.element_size()):
            buffer = next(self._buffers)
            buffer.wait()
            rows = buffer.view(source[part]).copy_(source[part])
            target[part].copy_(rows, non_blocking=True)
            buffer.mark(self._stream)


class Drain:
    """Takes rows off a device and does the host's part of the work with them, in order, in a thread of its own.

    After a failure nothing more is done, and the next call, or the end of the block, raises it.

    Args:
        device: Where from; with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module = torch.get_device_module(device) if device.type != "cpu" else None
        self._free: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(_Buffer(device))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lox-drain")
        self._pending: deque[Future[None]] = deque()
        self._stopped = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stopped = self._stopped or kind is not None
        self._pool.shutdown()
        if kind is None:
            for future in self._pending:
                future.result()

    def rows(self, part: slice, tile: Tensor, take: Callable[[slice, Tensor], None]) -> None:
        """Hand rows to `take` on the host.

        Args:
            part: Which rows these are.
            tile: The rows; they may be written over once this returns, by work on the current stream.
            take: Called with slices of rows from top to bottom; a tile is valid only during the call.
        """
        stream = self._module.current_stream(self.device) if self._module else None
        for piece in tile_slices(*tile.shape, tile_elements=BUFFER_BYTES // tile.element_size()):
            buffer = self._free.get()
            rows = buffer.view(tile[piece]).copy_(tile[piece], non_blocking=True)
            buffer.mark(stream)
            place = slice(part.start + piece.start, part.start + piece.stop)
            self._submit(lambda buffer=buffer, place=place, rows=rows: self._deliver(buffer, place, rows, take))

    def then(self, work: Callable[[], None]) -> None:
        """Do something once all rows that were handed over so far are delivered."""
        self._submit(lambda: None if self._stopped else work())

    def _deliver(self, buffer: _Buffer, place: slice, rows: Tensor, take: Callable[[slice, Tensor], None]) -> None:
        try:
            if not self._stopped:
                buffer.wait()
                take(place, rows)
        finally:
            self._free.put(buffer)

    def _submit(self, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except BaseException:
                self._stopped = True
                raise

        self._pending.append(self._pool.submit(guarded))
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()
