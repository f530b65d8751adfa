"""KL divergence along a model's own answers: against sums in float64, and what must not matter."""

import copy
import math
import random
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from evaluation.small_models import make_model, make_tokenizer
from lox_hf.errors import ConfigError, LoxError, PromptError, UnsupportedModelError
from lox_hf.evaluation.data.prompts import Prompt, set_hash
from lox_hf.evaluation.divergence import AnswerReference, answer_reference, divergence
from lox_hf.evaluation.models.chat import ask
from lox_hf.evaluation.models.likelihood import Window
from lox_hf.evaluation.models.templates import encode

TEXTS = [" ".join(f"w{8 + (7 * i + j * j) % 50}" for j in range(1 + i * 23 % 39)) for i in range(9)]
TOKENS = 5


def moved(model: Any, by: float = 0.05, seed: int = 1) -> Any:
    """The model with noise on its matrices."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            if weight.ndim > 1:
                weight.add_(torch.randn(weight.shape, generator=generator) * by * weight.std())
    return other


def refer(model: Any, texts: Any = TEXTS, **changes: Any) -> AnswerReference:
    return answer_reference(model, make_tokenizer(model), texts, **{"tokens": TOKENS} | changes)


def by_a_plain_loop(model: Any, other: Any, texts: list[str], tokens: int = TOKENS) -> list[float]:
    """Mean KL along each greedy answer, both models in float64, a token at a time and nothing padded."""
    tokenizer = make_tokenizer(model)
    model, other = copy.deepcopy(model).double(), copy.deepcopy(other).double()
    means = []
    for text in texts:
        ids, found = encode(tokenizer, ask(text), "chat"), []
        while len(found) < tokens and (not found or ids[-1] != tokenizer.eos_token_id):
            with torch.no_grad():
                p, q = (one(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for one in (model, other))
            found.append((p.exp() * (p - q)).sum().item())
            ids = [*ids, int(p.argmax())]
        means.append(sum(found) / len(found))
    return means


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


def test_it_is_the_sum_by_hand(model: Any) -> None:
    other = moved(model)
    means = by_a_plain_loop(model, other, TEXTS)
    report = divergence(other, refer(model))
    assert report.kl == pytest.approx(sum(means) / len(means), rel=1e-4)  # float32 against float64
    assert report.kl > 0.01
    assert report.prompts == len(TEXTS)
    assert report.tokens <= TOKENS * len(TEXTS)
    assert report.low < report.kl < report.high
    assert report.sha256 == set_hash([Prompt(text, harmful=False) for text in TEXTS])


def test_it_is_the_direction_that_is_said(model: Any) -> None:
    """KL(reference || model): on one answer the other direction is another number."""
    other = moved(model, 0.2)
    there, back = (divergence(b, refer(a, TEXTS[:1])).kl for a, b in ((model, other), (other, model)))
    assert there == pytest.approx(by_a_plain_loop(model, other, TEXTS[:1])[0], rel=1e-4)
    assert back == pytest.approx(by_a_plain_loop(other, model, TEXTS[:1])[0], rel=1e-4)
    assert there != pytest.approx(back, rel=1e-2)


@pytest.mark.parametrize("kind", ["llama", "mamba2", "rwkv", "bloom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_does_not_differ_from_itself(kind: str, dtype: torch.dtype) -> None:
    model = make_model(kind).to(dtype)
    report = divergence(model, refer(model))
    assert (report.kl, report.low, report.high) == (0.0, 0.0, 0.0)
    assert divergence(moved(model), refer(model)).kl > 1e-4, "which another one does"


def test_a_tiny_step_is_seen(model: Any) -> None:
    """KL falls with the square of a step, far below what float32 sums of probabilities are off 1."""
    found = [divergence(moved(model, by), refer(model)).kl for by in (1e-4, 1e-5)]
    assert 30 < found[0] / found[1] < 300
    assert 0 < found[1] < 1e-6


def test_batches_make_no_difference(model: Any) -> None:
    other = moved(model)
    found = [divergence(other, refer(model, batch_size=size)) for size in (None, 1, 4)]
    assert [report.kl for report in found] == pytest.approx([found[0].kl] * 3, rel=1e-4)
    assert [report.low for report in found] == pytest.approx([found[0].low] * 3, rel=1e-4)
    assert len({report.tokens for report in found}) == 1


def test_the_order_of_the_prompts_makes_no_difference(model: Any) -> None:
    other, shuffled = moved(model), random.Random(0).sample(TEXTS, len(TEXTS))
    first, second = divergence(other, refer(model)), divergence(other, refer(model, shuffled))
    assert (second.kl, second.low, second.high) == pytest.approx((first.kl, first.low, first.high), rel=1e-4)


def test_each_prompt_counts_alike_whatever_its_length(model: Any) -> None:
    other, reference = moved(model), refer(model)
    single = [divergence(other, refer(model, [text])).kl for text in TEXTS]
    assert divergence(other, reference).kl == pytest.approx(sum(single) / len(single), rel=1e-4)
    assert len({round(kl, 5) for kl in single}) > 5


def test_an_answer_is_taken_with_its_end(model: Any) -> None:
    """One whose first token ends it has one position."""
    ending = copy.deepcopy(model)
    first = refer(model, TEXTS[:1], tokens=1).answers[0].ids[-1]
    ending.generation_config.eos_token_id = first
    answer = refer(ending, TEXTS[:1]).answers[0]
    assert (answer.predicted, answer.ids[-1]) == (1, first)
    assert refer(model, TEXTS[:1]).answers[0].predicted > 1


def test_a_model_is_left_as_it_is_found(model: Any) -> None:
    other = moved(model).train()
    before, state = copy.deepcopy(other.state_dict()), torch.random.get_rng_state()
    divergence(other, refer(other))
    assert all(module.training for module in other.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[name], weight) for name, weight in other.state_dict().items())
    assert not any(weight.grad is not None for weight in other.parameters())


def test_learnt_prompts_have_places_of_their_own(model: Any) -> None:
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = get_peft_model(copy.deepcopy(model), settings)
    assert divergence(tuned, refer(tuned, TEXTS[:2])).kl == 0
    assert divergence(tuned, refer(model, TEXTS[:2])).kl > 1e-4


def test_what_is_impossible_counts_nothing_or_everything(model: Any) -> None:
    """A token that the reference rules out adds nothing but what the other gives it; the other way it is infinite."""
    answers = (Window([3, 4], 1),)
    with torch.no_grad():
        found = model(torch.tensor([[3]])).logits[0].log_softmax(-1)
    ruled_out = found.clone()
    ruled_out[0, 9] = -math.inf
    ruled_out = ruled_out.log_softmax(-1)
    expected = -math.log(1 - found[0, 9].exp().item())  # p is q, but for one token, renormalised
    assert divergence(model, AnswerReference(answers, (ruled_out,), "")).kl == pytest.approx(expected, rel=1e-2)
    impossible = copy.deepcopy(model)
    impossible.lm_head.register_forward_hook(lambda *args: args[-1].index_fill(-1, torch.tensor([9]), -math.inf))
    report = divergence(impossible, AnswerReference(answers, (found,), ""))
    assert report.kl == math.inf
    assert math.isnan(report.low)


def test_only_harmless_prompts_count(model: Any) -> None:
    mixed = [Prompt(TEXTS[0]), *(Prompt(text, harmful=False) for text in TEXTS[1:])]
    assert refer(model, mixed).settings() == refer(model, TEXTS[1:]).settings()
    assert refer(model, TEXTS).settings() != refer(model, TEXTS[1:]).settings()


def test_prompts_without_an_answer_are_left_out_and_counted(model: Any) -> None:
    too_long = " ".join(["w9"] * (model.config.max_position_embeddings + 1))
    with pytest.warns(UserWarning, match="1 of 3 prompts are empty or too long"):
        reference = refer(model, [TEXTS[0], too_long, TEXTS[1]])
    assert divergence(model, reference).prompts == 2


class _TooFull:
    """Memory that never suffices."""

    def __call__(self, *_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_what_cannot_be_measured_is_said(model: Any) -> None:
    with pytest.raises(PromptError, match="on 1 prompts: none is harmless"):
        refer(model, [Prompt("w8")])
    with pytest.raises(PromptError, match="on 0 prompts"):
        refer(model, [])
    with pytest.raises(ConfigError, match="max_new_tokens and batch_size must be at least 1, got 0"):
        refer(model, tokens=0)
    with pytest.raises(UnsupportedModelError, match="is not a loaded model"):
        answer_reference(torch.nn.Linear(2, 2), make_tokenizer(model), TEXTS)  # pyrefly: ignore
    other = make_model("bloom")
    other.resize_token_embeddings(200)
    with pytest.raises(ConfigError, match="vocabulary has 200 tokens and the reference's 192"):
        divergence(other, refer(make_model("bloom")))
    full = copy.deepcopy(model)
    full.register_forward_pre_hook(_TooFull())
    with pytest.raises(LoxError, match="does not suffice for one answer of"):
        divergence(full, refer(model))
