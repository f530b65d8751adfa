"""The global random states of this process."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Give Python, NumPy and torch, on every device, their global random states back afterwards.

    Example:
        >>> before = torch.get_rng_state()
        >>> with random_states_kept():
        ...     drawn = torch.rand(3)
        >>> torch.equal(torch.get_rng_state(), before)
        True
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = range(torch.accelerator.device_count()) if accelerator else ()
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices, device_type=accelerator.type if accelerator else "cuda"):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
