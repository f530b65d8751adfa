"""Runs that go on, batch sizes, adapters, settings, and what is refused before anything is generated."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from small_models import NEW_TOKENS, answers, make_conversations, make_model, make_tokenizer, one_by_one, watched
from transformers import GPT2Config, GPT2Model, T5Config, T5ForConditionalGeneration

from lox_hf.errors import ConfigError, PromptError, UnsupportedModelError
from lox_hf.evaluation.models import batch_size as batch_size_module
from lox_hf.evaluation.models.chat import ask
from lox_hf.evaluation.models.local import LocalModel


def make_chat(batch_size: int | None = 4, **options: Any) -> LocalModel:
    model = make_model()
    return LocalModel(
        model, make_tokenizer(model), **{"max_new_tokens": NEW_TOKENS, "batch_size": batch_size} | options
    )


def adapted(model: Any) -> Any:
    """A LoRA adapter on a model, with factors that matter."""
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in peft_model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.5, generator=generator)
    return peft_model.eval()


def test_a_run_that_goes_on_composes_the_same_batches() -> None:
    chat, conversations = make_chat(), make_conversations()
    whole = list(chat.replies(conversations))
    batches = [[position for position, _ in whole[start : start + 4]] for start in range(0, len(whole), 4)]
    lengths = [len(conversations[position][0]["content"].split()) for position, _ in whole]
    assert lengths == sorted(lengths, reverse=True)
    done = [*batches[0], *batches[2], *batches[3][:3]]  # the fourth was cut short
    assert list(chat.replies(conversations, done)) == [
        pair for pair in whole if pair[0] not in batches[0] + batches[2]
    ]
    assert list(chat.replies(conversations, range(21))) == []
    assert list(chat.replies([])) == []


def test_replies_come_batch_by_batch() -> None:
    chat = make_chat()
    with watched(chat._model) as batches:
        replies = chat.replies(make_conversations())
        next(replies)
        assert len(batches) == 1
        replies.close()
        assert len(batches) == 1


def test_the_batch_size_follows_the_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    for free_kib in (1 << 24, 64_000, 63_000, 1500, 1):
        memory = tmp_path / "meminfo"
        memory.write_text(f"MemTotal: 99999999 kB\nMemAvailable: {free_kib} kB\n")
        monkeypatch.setattr(batch_size_module, "_MEMORY", memory)
        chat = make_chat(batch_size=None)
        list(chat.replies([ask("w9")]))
        sizes.append(chat.batch_size)
    assert sizes[0] == 128
    assert sizes[1] == sizes[2]
    assert sizes[-1] == 1
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) >= 3


def test_a_container_that_has_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size_module, "_CONTAINER", tmp_path)
    (tmp_path / "memory.current").write_text("2000000\n")
    sizes = []
    for limit in ("max", "5000000"):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        chat = make_chat(batch_size=None)
        list(chat.replies([ask("w9")]))
        sizes.append(chat.batch_size)
    assert sizes[0] == 128
    assert sizes[1] < 32


def test_an_adapter_answers_as_the_merged_model_does() -> None:
    model, conversations = make_model(), make_conversations()
    tokenizer = make_tokenizer(model)
    plain = one_by_one(model, tokenizer, conversations)
    peft_model = adapted(model)
    inside = [set(vars(module)) for module in peft_model.modules()]
    chat = LocalModel(peft_model, tokenizer, max_new_tokens=NEW_TOKENS, batch_size=8)
    with_adapter = answers(chat, conversations)
    with peft_model.disable_adapter():
        assert answers(chat, conversations) == plain
    assert [set(vars(module)) for module in peft_model.modules()] == inside
    assert with_adapter != plain
    assert with_adapter == one_by_one(peft_model.merge_and_unload(), tokenizer, conversations)


def test_learnt_prompts_answer_as_peft_does() -> None:
    model, conversations = make_model(), make_conversations(6)
    tokenizer = make_tokenizer(model)
    plain = one_by_one(model, tokenizer, conversations)
    torch.manual_seed(0)
    peft_model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    expected = one_by_one(peft_model, tokenizer, conversations)
    chat = LocalModel(peft_model, tokenizer, max_new_tokens=NEW_TOKENS, batch_size=4)
    assert answers(chat, conversations) == expected != plain
    assert chat.batch_size == 1


def test_a_compiled_model_answers() -> None:
    chat, conversations = make_chat(), make_conversations(5)
    compiled = LocalModel(torch.compile(chat._model), chat._tokenizer, max_new_tokens=NEW_TOKENS, batch_size=4)
    assert answers(compiled, conversations) == answers(chat, conversations)


def test_settings_say_what_an_answer_depends_on() -> None:
    chat = make_chat(chat_template_kwargs={"enable_thinking": False})
    settings = chat.settings()
    assert json.loads(json.dumps(settings)) == settings
    assert (settings["template"], settings["max_new_tokens"], settings["dtype"]) == ("chat", NEW_TOKENS, "float32")
    assert settings["chat_template_kwargs"] == {"enable_thinking": False}
    assert make_chat(chat_template_kwargs={"enable_thinking": False}).settings() == settings
    chat._tokenizer.chat_template += " "
    assert chat.settings()["chat_template_hash"] != settings["chat_template_hash"]
    assert "chat_template_hash" not in make_chat(template="alpaca").settings()


def test_settings_tell_models_of_one_name_apart() -> None:
    chat = make_chat()
    before = chat.settings()["weights_sample"]
    assert chat.settings()["weights_sample"] == before
    peft_model = adapted(chat._model)
    wrapped = LocalModel(peft_model, chat._tokenizer)
    on = wrapped.settings()["weights_sample"]
    with peft_model.disable_adapter():
        off = wrapped.settings()["weights_sample"]
    chat = make_chat()
    with torch.no_grad():
        chat._model.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    assert len({before, on, off, chat.settings()["weights_sample"]}) == 4


def test_the_name_is_that_of_the_model() -> None:
    model = make_model()
    assert LocalModel(model, make_tokenizer(model)).name == "LlamaForCausalLM"
    model.config._name_or_path = "org/model"
    assert LocalModel(model, make_tokenizer(model)).name == "org/model"


def test_prompts_that_do_not_fit_are_named_together_before_anything_is_generated() -> None:
    chat = make_chat()
    conversations = [ask("w9"), ask("w9 " * 60), ask("w9 " * 49), ask("w9 " * 50)]
    with watched(chat._model) as batches, pytest.raises(PromptError) as error:
        list(chat.replies(conversations))
    assert batches == []
    assert "2 of 4 prompts do not fit the context of 'LlamaForCausalLM', 64 tokens with 10" in str(error.value)
    assert "1 (65), 3 (55), counted from 0" in str(error.value)
    assert len(dict(chat.replies([*conversations[:1], *conversations[2:3]]))) == 2  # 54 and 10 just fit


def test_prompts_without_a_token_are_named() -> None:
    chat = make_chat(template="none")
    with pytest.raises(PromptError, match="without a token: numbers 1, 2, counted from 0"):
        list(chat.replies([ask("w9"), ask(""), ask(" ")]))


def test_a_tokenizer_of_another_model_is_refused() -> None:
    model = make_model("qwen2")
    chat = LocalModel(model, make_tokenizer(make_model()), max_new_tokens=NEW_TOKENS)
    with pytest.raises(ConfigError, match=r"does not belong to .* gives token 100, and the model has 64"):
        list(chat.replies([ask("w9 w100")]))


def test_models_that_do_not_continue_a_text_are_refused() -> None:
    sizes = {"vocab_size": 8, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    encoder_decoder = T5ForConditionalGeneration(T5Config(**sizes))
    headless = GPT2Model(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2))
    tokenizer = make_tokenizer(make_model())
    with pytest.raises(UnsupportedModelError, match=r"T5ForConditionalGeneration \(t5\) is an encoder-decoder"):
        LocalModel(encoder_decoder, tokenizer)
    with pytest.raises(
        UnsupportedModelError, match="GPT2Model cannot generate text: load it with AutoModelForCausalLM"
    ):
        LocalModel(headless, tokenizer)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1, got 0 and 4"):
        make_chat(max_new_tokens=0)
    with pytest.raises(ConfigError, match="at least 1, got 10 and 0"):
        make_chat(batch_size=0)
    with pytest.raises(ConfigError, match="LlamaForCausalLM needs its tokenizer"):
        LocalModel(make_model(), None)
