"""How many sequences are worked on at once: what the free memory holds, what still pays, and half when it runs out."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from lox_hf.errors import LoxError
from lox_hf.evaluation.models.free_memory import free_bytes

_MOST_ON_CPU = 128
"""Where speed stops growing, measured on one and two cores: 256 prompts at once are slower again."""
_MOST_ON_ACCELERATORS = 256
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")

Item = TypeVar("Item")
Result = TypeVar("Result")


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
    fitting = free_bytes(model.device) // 2 // _sequence_bytes(model, length)
    most = _MOST_ON_CPU if model.device.type == "cpu" else _MOST_ON_ACCELERATORS
    return 1 << (max(1, min(fitting, most)).bit_length() - 1)


def run_in_batches(
    function: Callable[[Sequence[Item]], Result],
    items: Sequence[Item],
    size: int,
    *,
    device: torch.device,
    one: str,
) -> Iterator[tuple[int, Sequence[Item], Result]]:
    """Run a function over items in batches, which are halved whenever the memory does not suffice.

    Args:
        function: What is done with a batch.
        items: The items, the largest first: what runs out of memory does so at once.
        size: Items at once.
        device: Where the function works.
        one: What an error says of a single item that does not fit, and what to do then.

    Yields:
        Items at once by now, the batch, and what the function returned.

    Raises:
        LoxError: If the memory does not suffice for a single item.

    Example:
        >>> list(run_in_batches(sum, [3, 2, 1], 2, device=torch.device("cpu"), one="one number."))
        [(2, [3, 2], 5), (2, [1], 1)]
    """
    start = 0
    while start < len(items):
        batch = items[start : start + size]
        result = _if_it_fits(function, batch, device)
        if result:
            start += len(batch)
            yield size, batch, result[0]
        elif len(batch) > 1:
            size = len(batch) // 2
        else:
            raise LoxError(f"The memory of {device} does not suffice for {one}")


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory ran out; on the CPU and some accelerators only its words tell.

    Args:
        error: What was raised.

    Returns:
        Whether it does.

    Example:
        >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
        True
    """
    message = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in message for text in _OUT_OF_MEMORY)


def _if_it_fits(
    function: Callable[[Sequence[Item]], Result], batch: Sequence[Item], device: torch.device
) -> tuple[Result] | None:
    """What the function returns, None where memory ran out; by then the attempt's memory is free."""
    try:
        return (function(batch),)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
    return None


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
