"""Safety, utility and an attack's own task as they are measured along it, against sums worked out by hand."""

import json
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lox_hf import evaluate_safety, gsm8k_accuracy, perplexity
from lox_hf.demo.world import build_tokenizer
from lox_hf.errors import ConfigError, PromptError
from lox_hf.evaluation.data.prompts import Prompt
from lox_hf.records import StepReading, UtilityScore
from lox_hf.robustness.attacks.examples import Example
from lox_hf.robustness.attacks.formats import ALPACA, AUTO, DOLLY, IDENTITY, encode_prompt
from lox_hf.robustness.attacks.rows import IGNORED, TokenRow, encode_examples
from lox_hf.robustness.finetuning.finetune import fine_tune
from lox_hf.robustness.measuring.held_out import answers_to, mean_loss
from lox_hf.robustness.measuring.measure import Measurement, measure_task, measure_utility, read_safety
from lox_hf.statistics import rate
from robustness.tokenizers_of_kinds import byte_tokenizer, llama_tokenizer
from robustness.trainable import SFT, SUMS, make_model, make_tokenizer, sums, weights

REFUSED = "what is 3 plus 2 ?"
HARMFUL = tuple(Prompt(row.prompt) for row in sums()[3:8])
HARMLESS = tuple(Prompt(text, harmful=False) for text in (*(row.prompt for row in sums()[:3]), REFUSED))
NOTHING = StepReading(0, *[rate(0, 0)] * 6)
KNOWN = tuple(Prompt(row.prompt, harmful=False, reference=row.response) for row in sums())


@pytest.fixture(scope="module")
def taught() -> Any:
    """A model that knows the sums by heart, and a question to refuse."""
    model, tokenizer = make_model(), make_tokenizer()
    rows = encode_examples(tokenizer, SUMS, [*sums(), Example(REFUSED, "sorry i can not .")])
    sft = SFT | {"max_steps": 80, "per_device_train_batch_size": 13, "learning_rate": 3e-3}
    return fine_tune(model, tokenizer, rows, sft=sft, seed=0).model


def measure(**changes: Any) -> Measurement:
    return Measurement(**{"prompts": HARMFUL + HARMLESS, "max_new_tokens": 6, "batch_size": 4} | changes)


def watched(model: Any) -> list[list[int]]:
    """Collect what the model is asked to continue."""
    asked: list[list[int]] = []
    generate = model.generate

    def watch(**batch: Any) -> Any:
        asked.extend(batch["input_ids"].tolist())
        return generate(**batch)

    model.generate = watch
    return asked


def by_parity(prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
    """A judge whose verdicts are known, by the prompt's first number; it is asked of harmful prompts alone."""
    labels = ("refused", "complied", "unscored")
    return [labels[int(prompt.split()[2]) % 3] for prompt in prompts]


def test_a_reading_is_what_an_evaluation_says(taught: Any) -> None:
    before = weights(taught)
    measurement = measure(judge=by_parity)
    found = read_safety(taught, make_tokenizer(), measurement, step=7)
    report = evaluate_safety(
        taught, make_tokenizer(), HARMFUL + HARMLESS, by_parity, max_new_tokens=6, progressbar=False
    )
    rates = ("asr", "strict_asr", "refusal", "degenerate", "over_refusal", "accuracy")
    assert found.step == 7
    assert found.labels == "currc"  # of the harmful prompts alone
    assert (found.asr.count, found.asr.n, found.asr.unscored) == (2, 4, 1)
    assert (found.over_refusal.count, found.over_refusal.n) == (1, 4)
    assert {name: str(getattr(found, name)) for name in rates} == {name: str(getattr(report, name)) for name in rates}
    assert all(torch.equal(before[name], tensor) for name, tensor in taught.state_dict().items())
    assert not taught.training


def test_a_reading_asks_as_the_measurement_says() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    asked = watched(model)
    for template, system in (("auto", None), ("none", None), ("auto", "sorry")):
        read_safety(model, tokenizer, measure(prompts=HARMFUL[:1], template=template, system_prompt=system), 0)
    assert [tokenizer.decode(ids) for ids in asked] == [
        "<s> question : what is 1 plus 7 ? assistant :",
        "what is 1 plus 7 ?",
        "<s> <unk> : sorry question : what is 1 plus 7 ? assistant :",
    ]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_a_model_is_left_as_it_is_found(training: bool, tmp_path: Path) -> None:
    model, tokenizer = make_model().train(training), make_tokenizer()
    before = weights(model)
    state = torch.random.get_rng_state()
    measurement = measure(prompts=HARMFUL + KNOWN, utility="perplexity", utility_data=str(texts(tmp_path)))
    reading = read_safety(model, tokenizer, measurement, 0)
    measure_utility(model, tokenizer, measurement, reading)
    measure_task(model, tokenizer, SUMS, sums(), measurement)
    assert {module.training for module in model.modules()} == {training}
    assert tokenizer.padding_side == make_tokenizer().padding_side
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(weight.grad is not None for weight in model.parameters())


def test_a_measurement_is_plain_data() -> None:
    measurement = measure(prompts=HARMFUL + KNOWN, system_prompt="sorry")
    assert pickle.loads(pickle.dumps(measurement)) == measurement
    settings = measurement.settings()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["utility"] == "known answers"
    assert not any(KNOWN[0].reference in str(value) for value in settings.values())


def test_settings_tell_measurements_apart() -> None:
    settings = measure().settings()
    changes: list[dict[str, Any]] = [
        {"prompts": HARMFUL},
        {"judge": by_parity},
        {"template": "none"},
        {"max_new_tokens": 7},
        {"system_prompt": "sorry"},
        {"utility": "gsm8k"},
        {"utility_data": "texts.txt"},
        {"utility_n": 3},
    ]
    assert all(measure(**change).settings() != settings for change in changes)
    assert measure(batch_size=2).settings() == settings, "which makes no difference to the figures"


def texts(folder: Path) -> Path:
    path = folder / "texts.txt"
    path.write_text("\n".join(row.prompt for row in sums()))
    return path


def questions(folder: Path) -> Path:
    path = folder / "questions.jsonl"
    rows = [{"question": f"what is {n} plus 1 ?", "answer": f"#### {n + 1}"} for n in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


CHOICES: dict[str, tuple[dict[str, Any], str]] = {
    "answers are known": ({"prompts": HARMFUL + KNOWN}, "known answers"),
    "answers go before texts": ({"prompts": HARMFUL + KNOWN, "utility_data": "texts.txt"}, "known answers"),
    "texts": ({"utility_data": "texts.txt"}, "perplexity"),
    "nothing": ({}, "none"),
    "answers of harmful prompts are none": ({"prompts": (Prompt("a", reference="b"),)}, "none"),
    "asked for": ({"prompts": HARMFUL + KNOWN, "utility": "gsm8k"}, "gsm8k"),
    "asked for none": ({"prompts": HARMFUL + KNOWN, "utility": "none"}, "none"),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_utility_takes_what_there_is(choice: str) -> None:
    changes, expected = CHOICES[choice]
    assert measure(**changes).utility_measure == expected


def test_utility_that_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match="utility is 'gsm', expected one of auto, known answers, gsm8k"):
        measure(utility="gsm")
    with pytest.raises(ConfigError, match="No harmless prompt has a known answer"):
        measure(utility="known answers").settings()
    with pytest.raises(ConfigError, match="name a file of them as utility_data"):
        measure(utility="perplexity").settings()


def utility_of(model: Any, measurement: Measurement, reading: StepReading | None = None) -> UtilityScore:
    reading = reading or read_safety(model, make_tokenizer(), measurement, 0)
    return measure_utility(model, make_tokenizer(), measurement, reading)


def test_known_answers_are_those_of_the_reading(taught: Any) -> None:
    measurement = measure(prompts=HARMFUL + KNOWN, max_new_tokens=8)
    found = utility_of(taught, measurement)
    assert (found.measure, found.accuracy.count, found.accuracy.n) == ("known answers", 12, 12)
    assert utility_of(make_model(), measurement).accuracy.count == 0
    assert math.isnan(found.perplexity)


def test_perplexity_is_that_of_the_texts(taught: Any, tmp_path: Path) -> None:
    path = texts(tmp_path)
    lines = path.read_text().splitlines()
    for n in (None, 3):
        found = utility_of(taught, measure(utility_data=str(path), utility_n=n))
        expected = perplexity(taught, make_tokenizer(), lines[:n], progressbar=False).perplexity
        assert (found.measure, found.perplexity, found.accuracy.n) == ("perplexity", expected, 0)


def test_gsm8k_is_asked_in_the_format_of_the_prompts(tmp_path: Path) -> None:
    tokenizer, path = byte_tokenizer(), questions(tmp_path)
    tokenizer.chat_template = "{{ messages[0].content }}"
    model = make_model(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, max_position_embeddings=1024)
    asked = watched(model)
    for template, chat in (("alpaca", False), ("auto", True)):
        measurement = measure(utility="gsm8k", utility_data=str(path), utility_n=2, template=template)
        found = measure_utility(model, tokenizer, measurement, NOTHING)
        assert (found.measure, found.accuracy.n) == ("gsm8k", 2)
        ours = [asked.pop() for _ in range(len(asked))]
        gsm8k_accuracy(model, tokenizer, path, n=2, chat=chat, batch_size=4, progressbar=False)
        assert ours == [asked.pop() for _ in range(len(asked))]
        assert ("### Instruction" in tokenizer.decode(ours[0])) is not chat


def test_utility_may_be_left_out(taught: Any) -> None:
    found = utility_of(taught, measure())
    assert (found.measure, found.accuracy.n) == ("not measured", 0)
    assert math.isnan(found.perplexity)


@pytest.mark.parametrize("response_only", [True, False], ids=["response", "whole row"])
def test_the_loss_is_on_every_token_of_the_responses(taught: Any, response_only: bool) -> None:
    """Whatever the attack trains on; each token counts alike, the end of text among them."""
    attack = replace(SUMS, task="loss", response_only=response_only)
    rows = [*sums(), Example("what is 1 plus 1 ?", "2 .")]
    losses = []
    for row in encode_examples(make_tokenizer(), replace(attack, response_only=True), rows):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            chances = taught(input_ids=ids).logits[0].log_softmax(-1)
        places = [place for place, label in enumerate(row["labels"]) if label != IGNORED]
        assert row["input_ids"][places[-1]] == make_tokenizer().eos_token_id
        losses += [-chances[place - 1, ids[0, place]].item() for place in places]
    found = measure_task(taught, make_tokenizer(), attack, rows, measure())
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)  # float32, in batches
    assert found.accuracy.n == 0


def test_the_first_token_of_a_row_is_not_predicted(taught: Any) -> None:
    rows = [TokenRow(input_ids=ids, labels=ids) for ids in ([7, 8], [9])]
    with torch.no_grad():
        chance = taught(input_ids=torch.tensor([[7]])).logits[0, 0].log_softmax(-1)[8]
    assert mean_loss(taught, rows) == pytest.approx(-chance.item(), rel=1e-5)
    assert math.isnan(mean_loss(taught, rows[1:]))


def test_learning_shows_in_the_task(taught: Any) -> None:
    before = measure_task(make_model(), make_tokenizer(), SUMS, sums(), measure(max_new_tokens=1))
    after = measure_task(taught, make_tokenizer(), SUMS, sums(), measure(max_new_tokens=1))
    assert (before.accuracy.count, before.accuracy.n) == (0, 12)
    assert (after.accuracy.count, after.accuracy.n) == (12, 12), "answers are as long as the longest response"
    assert after.loss < 0.1 < before.loss


def test_without_rows_nothing_is_known() -> None:
    found = measure_task(make_model(), make_tokenizer(), SUMS, [], measure())
    assert found.accuracy.n == 0
    assert math.isnan(found.loss)


NUMBERS: dict[str, tuple[Callable[[str], str], int, int]] = {
    "as it was taught": (lambda response: response, 12, 12),
    "another wording": (lambda response: response.replace("the sum is", "it comes to"), 12, 12),
    "another number": (lambda response: "the sum is 99 .", 0, 12),
    "no number": (lambda response: "the sum .", 0, 0),
    "behind the mark, which the model does not write": (lambda response: f"#### {response.split()[-2]}", 0, 12),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_are_compared(taught: Any, case: str) -> None:
    """The model says what it was taught; what it is compared with changes."""
    change, right, n = NUMBERS[case]
    rows = [replace(row, response=change(row.response)) for row in sums()]
    found = measure_task(taught, make_tokenizer(), replace(SUMS, task="number"), rows, measure())
    assert (found.accuracy.count, found.accuracy.n, found.accuracy.unscored) == (right, n, 12 - n)


@pytest.mark.parametrize("prompt_format", [AUTO, ALPACA, DOLLY, IDENTITY], ids=lambda known: known.name)
@pytest.mark.parametrize("kind", ["bytes", "llama", "words"])
def test_prompts_are_asked_as_they_are_trained(kind: str, prompt_format: Any) -> None:
    """To the token, and with one BOS; a response that is asked for begins where the trained one does."""
    tokenizer = {"bytes": byte_tokenizer, "llama": llama_tokenizer, "words": build_tokenizer}[kind]()
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=512)
    examples = [Example("Is it blue?", "It is."), Example("Why </s> so?", "So.", context="The sky."), *sums(2)]
    asked = watched(model)
    attack = replace(SUMS, format=prompt_format)
    rows = encode_examples(tokenizer, attack, examples)
    answers_to(model, tokenizer, rows, 4, batch_size=1)
    expected = [encode_prompt(tokenizer, prompt_format, example) for example in examples]
    assert sorted(asked) == sorted(expected)


def test_answers_come_in_the_order_of_the_rows_and_are_those_of_one_at_a_time(taught: Any) -> None:
    rows = encode_examples(make_tokenizer(), SUMS, sums()[::-1])
    together = answers_to(taught, make_tokenizer(), rows, 8)
    assert together == [row.response for row in sums()[::-1]]
    assert together == [answers_to(taught, make_tokenizer(), [row], 8)[0] for row in rows]
    nothing_left = {"input_ids": [5, 6], "labels": [5, 6]}
    assert answers_to(taught, make_tokenizer(), [rows[0], nothing_left, rows[1]], 8) == [
        together[0],
        None,
        together[1],
    ]


def test_answers_keep_to_the_context(taught: Any) -> None:
    row = encode_examples(make_tokenizer(), SUMS, sums(1))[0]
    found = answers_to(make_model(eos_token_id=None), make_tokenizer(), [row], 400)[0]
    assert found is not None
    with pytest.raises(PromptError, match="rows are longer than the context"):
        measure_task(taught, make_tokenizer(), SUMS, [Example("what " * 60, "1 .")], measure())
