"""Perplexity: against transformers' own loss, one text at a time, and its documentation's sliding window."""

import copy
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tokenizers import processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
)

import zoo
from lox_hf.errors import ConfigError, LoxError, PromptError, UnsupportedModelError
from lox_hf.evaluation.models.endpoint import Endpoint
from lox_hf.evaluation.models.likelihood import fitting_windows, split
from lox_hf.evaluation.utility import load_texts, perplexity

VOCABULARY = 64
TEXTS = [
    " ".join(f"w{4 + (7 * place + 3 * number) % 60}" for place in range(length))
    for number, length in enumerate((3, 17, 1, 40, 8))
]
LONG = " ".join(f"w{4 + place * place % 60}" for place in range(100))


@pytest.fixture(scope="module")
def model() -> Iterator[LlamaForCausalLM]:
    """A small model with weights large enough to prefer some words clearly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, initializer_range=0.3, **settings)
        yield LlamaForCausalLM(config).eval()


@pytest.fixture
def plain() -> PreTrainedTokenizerFast:
    """A tokenizer that puts nothing in front."""
    return zoo.make_tokenizer(VOCABULARY)


@pytest.fixture
def with_bos() -> PreTrainedTokenizerFast:
    """A tokenizer that puts `<s>` in front."""
    tokenizer = zoo.make_tokenizer(VOCABULARY)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def own_loss(model: LlamaForCausalLM, ids: list[int]) -> float:
    """Transformers' mean loss over a sequence."""
    batch = torch.tensor([ids])
    with torch.no_grad():
        return model(batch, labels=batch).loss.item()


def test_one_text_is_transformers_own_loss(model: LlamaForCausalLM, plain: PreTrainedTokenizerFast) -> None:
    report = perplexity(model, plain, [TEXTS[1]])
    expected = math.exp(own_loss(model, plain(TEXTS[1])["input_ids"]))
    assert report.perplexity == pytest.approx(expected, rel=1e-6)  # float32 sums in another order
    assert (report.tokens, report.texts) == (16, 1)
    assert perplexity(model, plain, [TEXTS[3]]).perplexity != pytest.approx(expected, rel=1e-2)


def test_a_padded_batch_is_the_texts_one_by_one(model: LlamaForCausalLM, with_bos: PreTrainedTokenizerFast) -> None:
    batched = perplexity(model, with_bos, TEXTS, batch_size=len(TEXTS))
    single = [perplexity(model, with_bos, [text]) for text in TEXTS]
    tokens = sum(report.tokens for report in single)
    total = sum(report.tokens * math.log(report.perplexity) for report in single)
    assert (batched.tokens, batched.texts) == (tokens, 5) == (3 + 17 + 1 + 40 + 8, 5)
    assert batched.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-6)  # rounding of float32
    assert perplexity(model, with_bos, TEXTS, batch_size=2).perplexity == pytest.approx(batched.perplexity, rel=1e-6)
    # Weighted by tokens, and not by texts.
    assert sum(report.perplexity for report in single) / 5 != pytest.approx(batched.perplexity, rel=1e-2)


def test_bos_stands_in_front_exactly_once(
    model: LlamaForCausalLM, plain: PreTrainedTokenizerFast, with_bos: PreTrainedTokenizerFast
) -> None:
    report = perplexity(model, with_bos, ["w5 w6 w7"])
    assert report.tokens == 3 and perplexity(model, plain, ["w5 w6 w7"]).tokens == 2
    assert report.perplexity == pytest.approx(math.exp(own_loss(model, [1, 5, 6, 7])), rel=1e-6)
    assert perplexity(model, with_bos, ["<s> w5 w6 w7"]).perplexity == report.perplexity
    assert report.perplexity != pytest.approx(math.exp(own_loss(model, [1, 1, 5, 6, 7])), rel=1e-2)


@pytest.mark.parametrize(("length", "stride"), [(32, 16), (32, 31), (20, 1), (64, 7)])
def test_long_texts_are_read_as_in_the_documentation_of_transformers(
    model: LlamaForCausalLM, plain: PreTrainedTokenizerFast, length: int, stride: int
) -> None:
    ids = torch.tensor([plain(LONG)["input_ids"]])
    total, end = 0.0, 0
    for begin in range(0, ids.shape[1], stride):
        known, end = end, min(begin + length, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : known - begin] = -100  # what an earlier window predicted
        with torch.no_grad():
            loss = model(ids[:, begin:end], labels=labels).loss.item()
        total += loss * (labels[:, 1:] != -100).sum().item()
        if end == ids.shape[1]:
            break
    report = perplexity(model, plain, [LONG], max_length=length, stride=stride)
    assert report.tokens == 99
    assert report.perplexity == pytest.approx(math.exp(total / 99), rel=1e-6)


def test_the_default_windows_are_the_models_with_half_of_one_between(
    model: LlamaForCausalLM, plain: PreTrainedTokenizerFast
) -> None:
    assert perplexity(model, plain, [LONG]) == perplexity(model, plain, [LONG], max_length=64, stride=32)
    shorter = perplexity(model, plain, [LONG], max_length=8)
    assert shorter.perplexity != pytest.approx(perplexity(model, plain, [LONG]).perplexity, rel=1e-4)


@pytest.mark.parametrize("size", range(24))
def test_every_token_but_the_first_is_predicted_once(size: int) -> None:
    ids = list(range(size))
    for length in range(2, 12):
        for stride in range(1, length):
            windows = list(split(ids, length, stride))
            predicted = [token for window in windows for token in window.ids[-window.predicted :]]
            assert predicted == ids[1:]
            assert all(window.predicted < len(window.ids) <= length for window in windows)


def test_logits_of_a_narrow_dtype_are_widened(model: LlamaForCausalLM, plain: PreTrainedTokenizerFast) -> None:
    narrow = LlamaForCausalLM(model.config).eval()
    narrow.load_state_dict(model.state_dict())
    narrow.to(torch.bfloat16)
    ids = torch.tensor([plain(TEXTS[3])["input_ids"]])
    with torch.no_grad():
        logits = narrow(ids).logits[0, :-1]
    wide, rounded = (
        -part.log_softmax(-1).gather(1, ids[0, 1:, None]).double().mean().item() for part in (logits.float(), logits)
    )
    found = math.log(perplexity(narrow, plain, [TEXTS[3]]).perplexity)
    assert found == pytest.approx(wide, rel=1e-6) and found != pytest.approx(rounded, rel=1e-5)


def test_model_and_tokenizer_are_left_as_they_were(plain: PreTrainedTokenizerFast) -> None:
    model = zoo.make_model("llama").train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.lm_head.eval()
    plain.padding_side = "left"
    plain.backend_tokenizer.enable_truncation(5)
    state = torch.get_rng_state()
    first, second = (perplexity(model, plain, [TEXTS[3]]) for _ in range(2))
    assert first == second and first.tokens == 39  # neither dropout nor truncation
    modes = {module.training for module in model.model.modules()}
    assert (modes, model.training, model.lm_head.training) == ({True}, True, False)
    assert torch.get_rng_state().equal(state) and model.lm_head.weight.grad is None
    assert plain.padding_side == "left" and plain.backend_tokenizer.truncation["max_length"] == 5
    ids = plain(TEXTS[3])["input_ids"]
    assert own_loss(model, ids) != own_loss(model, ids)  # dropout is on again


@pytest.mark.parametrize("texts", [["w5"], ["", ""]])
def test_nothing_to_predict_is_nan_with_a_warning(
    model: LlamaForCausalLM, plain: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    with pytest.warns(UserWarning, match="No token was predicted"):
        report = perplexity(model, plain, texts)
    assert math.isnan(report.perplexity) and (report.tokens, report.texts) == (0, len(texts))


def test_all_wrong_settings_are_named_at_once(model: LlamaForCausalLM, plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError) as caught:
        perplexity(model, plain, TEXTS, max_length=65, stride=65, batch_size=0)
    expected = ("max_length is 65, expected 2 to 64", "stride is 65, expected 1 to 64", "batch_size is 0")
    assert all(text in str(caught.value) for text in expected)
    for settings in ({"max_length": 1}, {"max_length": 0}, {"stride": 0}, {"max_length": 8, "stride": 8}):
        with pytest.raises(ConfigError):
            perplexity(model, plain, TEXTS, **settings)


def test_the_batch_is_bounded_by_its_logits(model: LlamaForCausalLM) -> None:
    assert fitting_windows(model, 10) == 64
    assert fitting_windows(model, 1 << 20) == (1 << 30) // (4 * VOCABULARY << 20)
    assert fitting_windows(model, 1 << 40) == 1


def test_files(model: LlamaForCausalLM, plain: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    lines, table = tmp_path / "texts.txt", tmp_path / "texts.csv"
    lines.write_text("\n".join(TEXTS))
    table.write_text("number,text\n" + "\n".join(f"{number},{text}" for number, text in enumerate(TEXTS)))
    assert load_texts(lines) == load_texts(table) == TEXTS
    assert perplexity(model, plain, str(lines)) == perplexity(model, plain, TEXTS)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("texts.jsonl", '{"text": "w5"}\n{"other": 1}\n', "1 of 2 rows have none: row 2."),
        ("texts.txt", "\n", "there are no rows"),
        ("texts.txt", b"\xff", "not UTF-8"),
        ("texts.pdf", "", "expected a name that ends in"),
    ],
)
def test_files_without_texts(tmp_path: Path, name: str, content: str | bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PromptError, match=expected):
        load_texts(path)


def test_lists_without_texts(model: LlamaForCausalLM, plain: PreTrainedTokenizerFast) -> None:
    for texts in ([], [5], ["w5", None]):
        with pytest.raises(PromptError, match="Expected texts to measure"):
            perplexity(model, plain, texts)  # type: ignore[arg-type]


def test_the_report_says_what_it_depends_on(model: LlamaForCausalLM, plain: PreTrainedTokenizerFast) -> None:
    report = perplexity(model, plain, TEXTS, max_length=32)
    assert (report.max_length, report.stride, report.dtype) == (32, 16, "float32")
    assert report.sha256 == hashlib.sha256(json.dumps(TEXTS).encode()).hexdigest()
    assert report.sha256 != perplexity(model, plain, [*TEXTS[:3], " ".join(TEXTS[3:])]).sha256


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_learnt_prompts_stand_before_every_window(
    model: LlamaForCausalLM, plain: PreTrainedTokenizerFast, kind: Any
) -> None:
    expected = perplexity(model, plain, TEXTS).perplexity
    torch.manual_seed(0)
    peft_model = get_peft_model(copy.deepcopy(model), kind(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    total, tokens = 0.0, 0
    for ids in plain(TEXTS)["input_ids"]:
        with torch.no_grad():
            logits = peft_model(torch.tensor([ids])).logits[0, -len(ids) :]
        total += torch.nn.functional.cross_entropy(
            logits[:-1], torch.tensor(ids[1:], dtype=torch.long), reduction="sum"
        ).item()
        tokens += len(ids) - 1
    report = perplexity(peft_model, plain, TEXTS)
    assert report.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)  # sums of float32 in other orders
    assert report.perplexity != pytest.approx(expected, rel=1e-3) and report.tokens == tokens
    assert report.max_length == 59  # of 64 places


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_memory_that_runs_out_halves_the_batches(
    model: LlamaForCausalLM, plain: PreTrainedTokenizerFast, error: Exception
) -> None:
    expected, rows, most = perplexity(model, plain, TEXTS), [], 2

    def look(_: Any, arguments: Any, options: dict[str, Any]) -> None:
        if len(options["input_ids"]) > most:
            raise error
        rows.append(len(options["input_ids"]))

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        assert perplexity(model, plain, TEXTS).perplexity == pytest.approx(expected.perplexity, rel=1e-6)
        assert rows == [2, 2]  # the text of one word has nothing to predict
        most = 0
        with pytest.raises(LoxError, match=r"memory of cpu does not suffice for one window of 40 tokens: lower max_l"):
            perplexity(model, plain, TEXTS)
    finally:
        hook.remove()


def test_models_without_a_number_to_give(model: LlamaForCausalLM, plain: PreTrainedTokenizerFast) -> None:
    small = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small["num_attention_heads"] = 2
    others: dict[Any, str] = {
        BertForMaskedLM(BertConfig(**small)): "BertForMaskedLM cannot generate text",
        LlamaModel(LlamaConfig(**small)): "LlamaModel cannot generate text",
        LlamaForSequenceClassification(LlamaConfig(**small)): "LlamaForSequenceClassification cannot generate text",
        Endpoint("org/model", base_url="http://127.0.0.1:9/v1"): "Endpoint is not a loaded model",
    }
    for other, expected in others.items():
        with pytest.raises(UnsupportedModelError, match=expected):
            perplexity(other, plain, TEXTS)
    with pytest.raises(ConfigError, match="LlamaForCausalLM needs its tokenizer"):
        perplexity(model, None, TEXTS)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match="does not belong to 'LlamaForCausalLM': it gives token 70, and the model has 64"
    ):
        perplexity(model, zoo.make_tokenizer(80), ["w5 w70"])
