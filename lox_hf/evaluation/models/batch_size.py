"""How many prompts are answered at once: what the free memory holds, and what still pays."""

from pathlib import Path
from typing import Any

import torch

_MOST_ON_CPU = 128
"""Where speed stops growing, measured on one and two cores: 256 prompts at once are slower again."""
_MOST_ON_ACCELERATORS = 256
_UNKNOWN_FREE_BYTES = 4 << 30
"""Taken where the system does not say what is free."""
_MEMORY = Path("/proc/meminfo")
_CONTAINER = Path("/sys/fs/cgroup")


def fitting_batch_size(model: Any, length: int) -> int:
    """Return how many sequences a model can generate at once in half of the free memory.

    Args:
        model: A transformers model.
        length: Tokens of the longest sequence, prompt and answer.

    Returns:
        A power of two, so that a little more or less free memory makes no difference.

    Example:
        >>> fitting_batch_size(model, 100)  # doctest: +SKIP
        128
    """
    fitting = _free_bytes(model.device) // 2 // _sequence_bytes(model, length)
    most = _MOST_ON_CPU if model.device.type == "cpu" else _MOST_ON_ACCELERATORS
    return 1 << (max(1, min(fitting, most)).bit_length() - 1)


def _sequence_bytes(model: Any, length: int) -> int:
    """Memory of one sequence, estimated: keys and values, activations of one layer, and logits of one token."""
    config, item = model.config.get_text_config(decoder=True), model.dtype.itemsize
    heads = getattr(config, "num_attention_heads", None) or 1
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    cache = 2 * config.num_hidden_layers * key_value_heads * head_dim
    # Residual stream, norm, queries, keys, values and attention; gate, up and their product.
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    activations = 8 * config.hidden_size + 3 * (inner if isinstance(inner, int) else max(inner))
    logits = config.vocab_size * (item + 8)  # as they come, widened to float32, and as scores
    return length * (cache + activations) * item + logits


def _free_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return _free_host_bytes()
    module = torch.get_device_module(device)
    module.empty_cache()  # what the allocator only keeps is free
    return module.mem_get_info(device)[0] if hasattr(module, "mem_get_info") else _UNKNOWN_FREE_BYTES


def _free_host_bytes() -> int:
    """What this process can still take: of the machine, or of its container where that has less."""
    try:
        lines = _MEMORY.read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return _UNKNOWN_FREE_BYTES
    try:
        limit, used = ((_CONTAINER / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return min(free, int(limit) - int(used)) if limit != "max" else free
    except OSError:
        return free
