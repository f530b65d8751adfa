"""A model in this process: batches that change no token, and a model and a tokenizer that are left as they were."""

import ctypes
import logging
import resource
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import (
    NEW_TOKENS,
    OTHERS,
    answers,
    make_conversations,
    make_model,
    make_tokenizer,
    one_by_one,
    watched,
)
from transformers import PreTrainedModel

import zoo
from lox_hf.errors import LoxError
from lox_hf.evaluation.models.chat import ask
from lox_hf.evaluation.models.local import LocalModel

KINDS = ("llama", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3", "mixtral", "gpt_oss", *OTHERS)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_change_no_token(kind: str) -> None:
    model = make_model(kind)
    tokenizer, conversations = make_tokenizer(model), make_conversations()
    expected = one_by_one(model, tokenizer, conversations)
    assert len(set(expected)) > len(expected) // 2  # the answers depend on the prompts
    for size in (1, 4, 64):
        assert (
            answers(LocalModel(model, tokenizer, max_new_tokens=NEW_TOKENS, batch_size=size), conversations)
            == expected
        )


def test_a_mask_that_lies_would_be_noticed() -> None:
    model = make_model()
    tokenizer, conversations = make_tokenizer(model), make_conversations()
    expected = one_by_one(model, tokenizer, conversations)

    def show_all(_: Any, arguments: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = options.get("attention_mask")
        return arguments, options | {"attention_mask": None if mask is None else torch.ones_like(mask)}

    model.register_forward_pre_hook(show_all, with_kwargs=True)
    assert answers(LocalModel(model, tokenizer, max_new_tokens=NEW_TOKENS, batch_size=8), conversations) != expected


def test_an_answer_ends_at_any_end_token_of_model_or_tokenizer() -> None:
    model = make_model()
    tokenizer, conversations = make_tokenizer(model), make_conversations()
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    full = list(dict(sorted(LocalModel(model, tokenizer, max_new_tokens=NEW_TOKENS).replies(conversations))).values())
    assert all(reply.cut_off for reply in full)
    words = [reply.text.split() for reply in full]
    ends = [words[0][3], words[1][5], words[2][7]]
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(ends[:2])
    tokenizer.eos_token = ends[2]
    found = dict(LocalModel(model, tokenizer, max_new_tokens=NEW_TOKENS).replies(conversations))
    for position, row in enumerate(words):
        end = next((place for place, word in enumerate(row) if word in ends), None)
        assert found[position].text.split() == row[:end]
        assert found[position].cut_off == (end is None)


def snapshot(model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """Everything about a model, a tokenizer and the process that generating might leave changed."""
    modules = {
        name: {key: value for key, value in vars(module).items() if not key.startswith("_") or "cache" in key}
        for name, module in model.named_modules()
    }
    modules[""]["generation_config"] = (id(model.generation_config), model.generation_config.to_dict())
    tokens = {key: str(value) for key, value in vars(tokenizer).items() if key != "_tokenizer"}
    return {
        "modules": {name: {key: str(value) for key, value in items.items()} for name, items in modules.items()},
        "config": model.config.to_dict(),
        "weights": zoo.fingerprint(model.state_dict() | dict(model.named_buffers())),
        "gradients": [(weight.requires_grad, weight.grad is None) for weight in model.parameters()],
        "tokenizer": (tokens, tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side, tokenizer.pad_token),
        "process": (torch.get_rng_state().tolist(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def in_training() -> tuple[PreTrainedModel, Any]:
    """A model and a tokenizer as a training run leaves them between two steps."""
    model = make_model()
    tokenizer = make_tokenizer(model)
    model.train()
    model.model.layers[1].eval()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.config.use_cache = False
    model.generation_config.update(do_sample=True, temperature=0.3, repetition_penalty=1.7, max_length=7)
    tokenizer.pad_token = None
    tokenizer.padding_side = "right"
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=5)
    return model, tokenizer


def test_model_and_tokenizer_are_left_as_found() -> None:
    model, tokenizer = in_training()
    before = snapshot(model, tokenizer)
    chat = LocalModel(model, tokenizer, max_new_tokens=NEW_TOKENS, batch_size=3)
    for _ in chat.replies(make_conversations(6)):
        assert snapshot(model, tokenizer) == before  # between two batches as well: the caller may train on
    chat.settings()
    assert snapshot(model, tokenizer) == before
    model(input_ids=torch.tensor([[4, 5, 6]]), labels=torch.tensor([[4, 5, 6]])).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_the_snapshot_notices_what_is_usually_left() -> None:
    model, tokenizer = in_training()
    before = snapshot(model, tokenizer)
    model.eval()
    tokenizer.padding_side, tokenizer.pad_token = "left", "<pad>"
    batch = tokenizer(["w4", "w5 w6"], padding=True, return_tensors="pt", return_token_type_ids=False)
    model.generation_config.max_length = None
    model.generate(**batch, max_new_tokens=2, cache_implementation="static")
    after = snapshot(model, tokenizer)
    different = {key for key in before if before[key] != after[key]}
    assert different == {"modules", "tokenizer", "process"}
    assert after["modules"][""].keys() - before["modules"][""].keys() == {"_previous_max_cache_length"}


def test_left_as_found_after_an_error_too() -> None:
    model, tokenizer = in_training()
    before = snapshot(model, tokenizer)
    chat = LocalModel(model, tokenizer, max_new_tokens=NEW_TOKENS, batch_size=8)
    with watched(model, most_rows=0), pytest.raises(LoxError):
        list(chat.replies(make_conversations(3)))
    assert snapshot(model, tokenizer) == before


def test_sampling_settings_of_the_model_neither_count_nor_warn() -> None:
    model = make_model()
    tokenizer, conversations = make_tokenizer(model), make_conversations(5)
    expected = one_by_one(model, tokenizer, conversations)
    model.generation_config.update(
        do_sample=True,
        temperature=0.6,
        top_k=5,
        repetition_penalty=9.0,
        num_beams=3,
        suppress_tokens=[9, 10],
        max_length=9,
    )
    assert one_by_one(model, tokenizer, conversations) != expected  # they do count for `generate`
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = answers(LocalModel(model, tokenizer, max_new_tokens=NEW_TOKENS), conversations)
        assert (found, records) == (expected, [])
        model.generate(torch.tensor([[4]]), do_sample=False, max_new_tokens=2)
        assert records  # the same settings do warn
    finally:
        logging.getLogger("transformers").removeHandler(handler)


def test_a_padding_token_is_not_needed_and_may_be_unknown_to_the_model() -> None:
    model = make_model()
    tokenizer, conversations = make_tokenizer(model), make_conversations()
    expected = one_by_one(model, tokenizer, conversations)
    chat = LocalModel(model, tokenizer, max_new_tokens=NEW_TOKENS, batch_size=8)
    tokenizer.pad_token = None
    assert answers(chat, conversations) == expected
    assert tokenizer.pad_token is None
    tokenizer.add_special_tokens({"pad_token": "<far>"})
    assert tokenizer.pad_token_id == model.config.vocab_size
    assert answers(chat, conversations) == expected


def test_memory_that_runs_out_halves_the_batches() -> None:
    model = make_model()
    tokenizer, conversations = make_tokenizer(model), make_conversations()
    chat = LocalModel(model, tokenizer, max_new_tokens=NEW_TOKENS, batch_size=16)
    with watched(model, most_rows=5) as batches:
        found = answers(chat, conversations)
    assert found == one_by_one(model, tokenizer, conversations)
    assert batches == [4] * 5
    assert chat.batch_size == 4


def test_one_prompt_that_does_not_fit() -> None:
    model = make_model()
    chat = LocalModel(model, make_tokenizer(model), max_new_tokens=NEW_TOKENS, batch_size=2)
    with (
        watched(model, most_rows=0),
        pytest.raises(LoxError, match=r"memory of cpu .* one prompt of 43 tokens and 10 new"),
    ):
        list(chat.replies([ask("w9 " * 38), ask("w9")]))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit a process's memory this way")
def test_memory_of_the_machine_that_runs_out() -> None:
    model = make_model()
    tokenizer, conversations = make_tokenizer(model), [ask("w9 " * 40)] * 4096
    chat = LocalModel(model, tokenizer, max_new_tokens=NEW_TOKENS, batch_size=4096)
    expected = answers(LocalModel(model, tokenizer, max_new_tokens=NEW_TOKENS), conversations[:1])
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed would count as room
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (48 << 20), hard))
    try:
        found = answers(chat, conversations)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert found == expected * 4096
    assert chat.batch_size is not None and chat.batch_size < 4096


def test_other_errors_of_the_model_are_not_memory() -> None:
    model = make_model()
    chat = LocalModel(model, make_tokenizer(model), max_new_tokens=NEW_TOKENS)

    def fail(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        list(chat.replies(make_conversations(2)))
