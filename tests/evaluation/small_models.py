"""Small models whose greedy answers differ from prompt to prompt, and what watches them answer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import zoo
from lox_hf.evaluation.models.chat import Conversation, ask
from lox_hf.evaluation.models.local import LocalModel

NEW_TOKENS = 10
CHAT_TEMPLATE = "{{ bos_token }} w4 w5 w6 {% for m in messages %}{{ m['content'] }} {% endfor %}w7"


_SIZES = {"vocab_size": 192, "hidden_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
OTHERS: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True, "new_decoder_architecture": False},
    "mamba2": {"num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "state_size": 4, "n_groups": 1},
    "rwkv": {"num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 64},
    "lfm2": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "layer_types": ["conv", "full_attention"],
    },
}
"""Models that are not in the zoo: linear biases, a state space, one that reads padding, and a hybrid."""


def make_model(kind: str = "llama") -> PreTrainedModel:
    """A model whose layers outweigh its embeddings, so that answers depend on the whole prompt."""
    if kind in OTHERS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **_SIZES, **OTHERS[kind])).eval()
    else:
        model = zoo.make_model(kind).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.5, generator=generator)
        model.get_input_embeddings().weight.mul_(0.02)
    return model


def make_tokenizer(model: PreTrainedModel) -> Any:
    tokenizer = zoo.make_tokenizer(model.config.vocab_size)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_conversations(count: int = 21) -> list[Conversation]:
    """Prompts of 1 to 39 words, no two alike, in no order of length."""
    return [ask(" ".join(f"w{8 + (7 * i + j * j) % 50}" for j in range(1 + i * 23 % 39))) for i in range(count)]


def one_by_one(model: PreTrainedModel, tokenizer: Any, conversations: Sequence[Conversation]) -> list[str]:
    """What `generate` itself answers to one prompt at a time, with its own cache."""
    texts = []
    for conversation in conversations:
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**ids, do_sample=False, max_new_tokens=NEW_TOKENS)
        texts.append(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def answers(chat: LocalModel, conversations: Sequence[Conversation], done: Sequence[int] = ()) -> list[str]:
    return [reply.text for _, reply in sorted(chat.replies(conversations, done))]


@contextmanager
def watched(model: torch.nn.Module, most_rows: int | None = None) -> Iterator[list[int]]:
    """Collect the rows of every first call for a batch; more than `most_rows` are out of memory."""
    batches: list[int] = []

    def look(_: Any, arguments: Any, options: dict[str, Any]) -> None:
        rows, tokens = options["input_ids"].shape
        if most_rows is not None and rows > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if tokens > 1 and rows > 1:
            batches.append(rows)

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield batches
    finally:
        hook.remove()
