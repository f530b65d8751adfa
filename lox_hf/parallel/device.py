"""Which device the work is done on, and how much of its memory may be taken."""

import math
import os

import torch

from lox_hf.errors import ConfigError

CPU = torch.device("cpu")
LARGEST_BUDGET = 8 * 2**30
"""More than this at once is not faster, and the copies of the first batch are waited for."""


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """Return the device that a name stands for.

    Args:
        device: A name such as "cuda", "cuda:1" or "cpu"; None and "auto" take this process's accelerator, and the CPU
            where there is none, or one without float64, which the decomposition needs.

    Returns:
        The device, with its index where it is an accelerator.

    Raises:
        ConfigError: If this machine has no such device, or if it lacks float64.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None or str(device) == "auto":
        return _indexed(accelerator) if accelerator is not None and in_batches(accelerator) else CPU
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device={str(device)!r} is no device: use auto, cpu, cuda or cuda:N.") from error
    if wanted.type == "cpu":
        return CPU
    if accelerator is None or wanted.type != accelerator.type:
        here = f"its accelerator is {accelerator.type}" if accelerator else "torch finds no accelerator"
        raise ConfigError(f"This machine has no device {str(wanted)!r}: {here}. Use device='auto' or 'cpu'.")
    if not in_batches(wanted):
        raise ConfigError(f"{wanted.type} has no float64, which the decomposition needs: use device='cpu'.")
    count = torch.accelerator.device_count()
    if wanted.index is not None and wanted.index >= count:
        raise ConfigError(f"This machine has no device {str(wanted)!r}: it has {count}, numbered from 0.")
    return _indexed(wanted)


def in_batches(device: torch.device) -> bool:
    """Whether the work is done in batches on a device: an accelerator that has float64."""
    return device.type not in ("cpu", "meta") and has_float64(device)


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64, which the decomposition needs; Apple's does not."""
    return device.type != "mps"


def memory_budget(device: torch.device) -> int:
    """How much memory of a device the work may take: half of what is free, at most `LARGEST_BUDGET`.

    Where torchrun has started more processes on this machine than it has devices, several have to share one.

    Args:
        device: The device; the CPU's memory is not asked for.

    Returns:
        Bytes.
    """
    if not in_batches(device):
        return LARGEST_BUDGET
    module = torch.get_device_module(device)
    free, _ = module.mem_get_info(device)
    kept = module.memory_reserved(device) - module.memory_allocated(device)  # by torch, for the next to ask
    sharing = math.ceil(int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / torch.accelerator.device_count())
    return min(LARGEST_BUDGET, (free + kept) // 2 // sharing)


def _indexed(device: torch.device) -> torch.device:
    """The device with its number: where several processes share the machine, each takes its own by its local rank."""
    if device.index is not None:
        return device
    if "LOCAL_RANK" in os.environ:
        return torch.device(device.type, int(os.environ["LOCAL_RANK"]) % torch.accelerator.device_count())
    return torch.device(device.type, torch.get_device_module(device).current_device())
