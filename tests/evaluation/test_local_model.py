"""Runs that go on, batch sizes, adapters, settings, and what is refused before anything is generated."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from small_models import NEW_TOKENS, answers, make_conversations, make_model, make_tokenizer, one_by_one, watched
from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from lox_hf.errors import ConfigError, PromptError, UnsupportedModelError
from lox_hf.evaluation.models import free_memory
from lox_hf.evaluation.models.chat import Reply, ask
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


def test_the_batch_size_is_found_at_the_first_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "_ROOT", tmp_path)
    sizes = []
    for free_kib in (1 << 24, 1500, 1):
        (tmp_path / "proc").mkdir(exist_ok=True)
        (tmp_path / "proc/meminfo").write_text(f"MemAvailable: {free_kib} kB\n")
        chat = make_chat(batch_size=None)
        assert chat.batch_size is None
        list(chat.replies([ask("w9")]))
        sizes.append(chat.batch_size)
    assert sizes[0] == 128 > sizes[1] > sizes[2] == 1


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


def test_prompts_that_the_model_cannot_read_do_not_stop_the_others() -> None:
    chat = make_chat(template="none")
    conversations = [ask("w9"), ask("w9 " * 60), ask(""), ask("w9 " * 54), ask("w9 " * 55)]
    found = dict(chat.replies(conversations))
    room = "and the model's context is 64 with 10 for the answer"
    assert found.keys() == set(range(5))
    assert found[1] == Reply("", error=f"the prompt has 60 tokens, {room}")
    assert found[2] == Reply("", error="the prompt has 0 tokens")
    assert found[4] == Reply("", error=f"the prompt has 55 tokens, {room}")
    readable = [conversations[0], conversations[3]]  # 54 and 10 just fit
    assert [found[0], found[3]] == [reply for _, reply in sorted(chat.replies(readable))]
    assert found[0].text and not found[0].error
    assert [position for position, _ in chat.replies(conversations, done=(0, 1, 3, 4))] == [2]


def test_prompts_of_which_none_can_be_read() -> None:
    chat = make_chat(template="none")
    with watched(chat._model) as batches, pytest.raises(PromptError) as error:
        list(chat.replies([ask("")] + [ask("w9 " * 60)] * 7))
    assert batches == []
    assert "'LlamaForCausalLM' can answer none of 8 prompts; numbers counted from 0: 0: the prompt has" in str(
        error.value
    )
    assert "7: " not in str(error.value) and "; and 3 more. Shorten them" in str(error.value)


def test_learnt_prompts_take_room_in_the_context() -> None:
    model = make_model("gpt2")
    tokenizer = make_tokenizer(model)
    peft_model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    chat = LocalModel(peft_model, tokenizer, template="none", max_new_tokens=NEW_TOKENS)
    found = dict(chat.replies([ask("w9 " * 51), ask("w9 " * 52)]))
    assert found[0].text and found[1].error.startswith("the prompt has 52 tokens, and the model's context is 61 with")


def test_a_model_without_a_generation_config_answers() -> None:
    chat, conversations = make_chat(), make_conversations(5)
    expected = answers(chat, conversations)
    chat._model.generation_config = None
    assert answers(chat, conversations) == expected
    assert chat._model.generation_config is None


def test_special_tokens_are_collected_once() -> None:
    class Counting(PreTrainedTokenizerFast):
        """Counts how often its added tokens are asked for."""

        count = 0

        @property
        def added_tokens_decoder(self) -> Any:
            type(self).count += 1
            return super().added_tokens_decoder

    chat = make_chat()
    tokenizer = Counting(tokenizer_object=chat._tokenizer.backend_tokenizer, eos_token="</s>")
    chat = LocalModel(chat._model, tokenizer, template="alpaca", max_new_tokens=NEW_TOKENS, batch_size=4)
    counts = []
    for size in (1, 12):
        Counting.count = 0
        list(chat.replies([ask("w9 </s> w8")] * size))
        counts.append(Counting.count)
    assert counts == [counts[0]] * 2 and counts[0] > 0


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
