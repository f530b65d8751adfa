"""Reused buffers: allocating a tile anew costs more in page faults than computing on it, and splinters the heap."""

import math
import threading

import torch
from torch import Tensor


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_use: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}


_buffers = _Buffers()


def scratch(use: str, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return this thread's buffer for one use; it is valid until the same use asks again in this thread.

    Args:
        use: What it is for; different uses never share memory.
        shape: Shape of the result.
        dtype: Its dtype.
        device: Its device.

    Returns:
        A contiguous tensor with arbitrary content.
    """
    buffers, size, key = _buffers.by_use, math.prod(shape), (use, dtype, device)
    if key not in buffers or buffers[key].numel() < size:
        buffers[key] = torch.empty(size, dtype=dtype, device=device)
    return buffers[key][:size].view(shape)


def free_scratch(device: torch.device) -> None:
    """Let go of this thread's buffers on one device; on an accelerator they are large, and its memory is short."""
    for key in [key for key in _buffers.by_use if key[2] == device]:
        del _buffers.by_use[key]
