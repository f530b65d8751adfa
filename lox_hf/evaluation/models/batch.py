"""A batch of prompts as `generate` takes it: padded, and with what all of them begin with worked out once."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import StaticCache

_WITHOUT_MASK = ("rwkv", "xlstm")


def make_batch(model: Any, prompts: Sequence[list[int]], *, max_new_tokens: int, filler: int) -> dict[str, Any]:
    """Pad prompts to one length and make the cache they are generated with.

    Padding stands on the left; where the cache holds a common beginning already (the opening of a prompt format, a
    system prompt), right after that. Positions count what the mask shows, so both give the same answers.

    Args:
        model: A transformers model, or a PEFT model around one, in evaluation mode.
        prompts: Token ids of each prompt, at least one each.
        max_new_tokens: Tokens that the cache has room for besides.
        filler: Any token of the model; it stands where the mask hides it.

    Returns:
        `input_ids` and `attention_mask` of shape (prompts, longest prompt), and `past_key_values`.
    """
    width = max(map(len, prompts))
    cache = _static_cache(model, width + max_new_tokens)
    # In a sliding window, padding between tokens would push some of them out.
    shared = _common_beginning(prompts) if cache is not None and not any(cache.is_sliding) else []
    ids = torch.full((len(prompts), width), filler)
    mask = torch.zeros_like(ids)
    ids[:, : len(shared)] = torch.tensor(shared, dtype=ids.dtype)
    mask[:, : len(shared)] = 1
    for row, prompt in enumerate(prompts):
        own = prompt[len(shared) :]
        ids[row, width - len(own) :] = torch.tensor(own)
        mask[row, width - len(own) :] = 1
    if cache is not None and shared:
        _fill(cache, model, shared, len(prompts))
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": mask.to(model.device),
        "past_key_values": cache,
    }


def learns_prompts(model: Any) -> bool:
    """Say whether the model has a PEFT adapter that puts learnt tokens in front of every prompt.

    Args:
        model: A transformers model, or a PEFT model around one.

    Returns:
        Whether it has.
    """
    return getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)


def reads_padding(model: Any) -> bool:
    """Say whether padding in front of a prompt changes the answer, although the mask hides it.

    Args:
        model: A transformers model, or a PEFT model around one.

    Returns:
        Whether it does. It stands between learnt prompts and the prompt; and some recurrent models take no mask.
    """
    return learns_prompts(model) or model.config.model_type in _WITHOUT_MASK


def _static_cache(model: Any, length: int) -> "StaticCache | None":
    """A cache allocated once, on the CPU, where growing one costs several times what attention does; else None."""
    # Linear biases (Falcon) are made from a mask of another shape than a static cache brings with it.
    able = getattr(model, "_can_compile_fullgraph", False) and not getattr(model.config, "alibi", False)
    # A trainer with bf16 has accelerate run the forward pass under autocast: keys are of another dtype than the model.
    mixed = any(hasattr(module, "_original_forward") for module in (model, getattr(model, "base_model", None)))
    if model.device.type != "cpu" or not able or mixed or learns_prompts(model):
        return None
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    cache = StaticCache(config=model.config, max_cache_len=length)
    # Other layers keep more than keys and values, or go by another name in the model.
    plain = all(type(layer) in (StaticLayer, StaticSlidingWindowLayer) for layer in cache.layers)
    return cache if plain else None


def _common_beginning(prompts: Sequence[list[int]]) -> list[int]:
    """What all prompts begin with, short of their last tokens: each has to have one of its own."""
    first, last = min(prompts), max(prompts)  # in the order of a dictionary, so the others share it too
    longest = min(map(len, prompts)) - 1
    return first[: next((place for place in range(longest) if first[place] != last[place]), longest)]


def _fill(cache: "StaticCache", model: Any, shared: list[int], rows: int) -> None:
    """Put keys and values of the common beginning into every row of an empty cache."""
    from transformers import DynamicCache

    known: Any = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([shared]), past_key_values=known, use_cache=True)
    for number, layer in enumerate(known.layers):
        cache.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), number)
