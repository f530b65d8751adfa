"""How much memory is free: of an accelerator, or of the machine and the containers this process runs in."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

_UNKNOWN_FREE_BYTES = 4 << 30
"""Taken where the system does not say what is free."""
_ROOT = Path("/")
# Limit, use, and the part of the use that is only a cache of files, in control groups of version 2 and 1.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device.

    Args:
        device: The device; what PyTorch only keeps of its memory is given back.

    Returns:
        Bytes; on the CPU what this process can still take of the machine, or of its containers where they have less.

    Example:
        >>> free_bytes(torch.device("cpu")) > 0
        True
    """
    if device.type == "cpu":
        return min([_free_on_machine(), *_free_in_groups()])
    module = torch.get_device_module(device)
    module.empty_cache()
    return module.mem_get_info(device)[0] if hasattr(module, "mem_get_info") else _UNKNOWN_FREE_BYTES


def _free_on_machine() -> int:
    try:
        return 1024 * _numbers(_ROOT / "proc/meminfo")["MemAvailable:"]
    except (OSError, KeyError):
        return _UNKNOWN_FREE_BYTES


def _free_in_groups() -> Iterator[int]:
    for folder in _memory_groups():
        for limit_name, used_name, cache_name in _FILES:
            with suppress(OSError, ValueError, KeyError):  # ValueError: the limit is "max"
                limit, used = (int((folder / name).read_text()) for name in (limit_name, used_name))
                yield max(0, limit - used + _numbers(folder / "memory.stat")[cache_name])


def _memory_groups() -> Iterator[Path]:
    """Folders of the control groups around this process; those above have limits too."""
    with suppress(OSError):
        for line in (_ROOT / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                top = _ROOT / "sys/fs/cgroup" / controllers
                group = top / path.lstrip("/")
                # Inside a container the path may be the one outside: then only the top is there.
                yield from [group, *(folder for folder in group.parents if folder.is_relative_to(top))]


def _numbers(path: Path) -> dict[str, int]:
    """Name -> number of a file with one of each in a line."""
    return {words[0]: int(words[1]) for line in path.read_text().splitlines() if len(words := line.split()) > 1}
