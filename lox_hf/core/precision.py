"""Products of float32 matrices in float32, whatever is set for training around them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from lox_hf.core.buffers import free_scratch

_BACKENDS: tuple[Any, ...] = (torch.backends.cuda, torch.backends.mkldnn)


@contextmanager
def exact_products() -> Iterator[None]:
    """Switch TF32, bfloat16 products of float32 matrices, and autocast off for a block: they round at the third digit.

    All but autocast holds for the whole process: enter it in the thread that starts others, never in several at once.

    Yields:
        Nothing; what was set before is set again afterwards.
    """
    accelerator = torch.accelerator.current_accelerator()
    with ExitStack() as stack:
        for kind in {"cpu", accelerator.type if accelerator else "cpu"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        before = _get()
        stack.callback(_set, before)
        _set(["ieee"] * len(before) if _by_backend() else ["highest"])
        yield


@contextmanager
def working_on(device: torch.device) -> Iterator[None]:
    """Work on a device: products of float32 in float32, no record for gradients, and no buffer left there.

    Args:
        device: The device.

    Yields:
        Nothing.
    """
    with torch.no_grad(), exact_products():
        try:
            yield
        finally:
            free_scratch(device)


def _by_backend() -> bool:
    """Whether this torch has a setting for each backend (2.9 on), with which reading the one for all may fail."""
    return hasattr(torch.backends, "fp32_precision")


def _get() -> list[str]:
    if _by_backend():
        return [backend.matmul.fp32_precision for backend in _BACKENDS]
    return [torch.get_float32_matmul_precision()]


def _set(values: list[str]) -> None:
    if _by_backend():
        for backend, value in zip(_BACKENDS, values, strict=True):
            backend.matmul.fp32_precision = value
    else:
        torch.set_float32_matmul_precision(*values)
