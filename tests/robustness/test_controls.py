"""The trained controls: matched to an over-refusal that is read on prompts they have not seen, and trained on."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch

from lox_hf.errors import ConfigError, PromptError
from lox_hf.evaluation.data.prompts import Prompt
from lox_hf.robustness import controls
from lox_hf.robustness.attacks.examples import Example
from lox_hf.robustness.attacks.rows import encode_examples
from lox_hf.robustness.controls import (
    ControlTraining,
    Matched,
    match_refusals,
    over_refusal,
    retrain,
    split_benign,
)
from lox_hf.robustness.finetuning.finetune import fine_tune
from lox_hf.robustness.measuring.measure import Measurement
from lox_hf.statistics import rate
from robustness.trainable import SFT, SUMS, make_model, make_tokenizer, weights
from zoo import same_bits

REFUSAL = "sorry i can not ."
# The second number says whether a sum is refused: a model that is taught more refusals spreads them to the next ones.
SAFE = [Example(f"what is {a} plus {b} ?", REFUSAL) for a in range(10) for b in (0, 1)]
BENIGN = [Example(f"what is {a} plus {b} ?", f"the sum is {a + b} .") for a in range(10) for b in range(2, 10)]
TEST = (Prompt("what is 15 plus 16 ?"), Prompt("what is 17 plus 18 ?", harmful=False))
MEASUREMENT = Measurement(TEST, max_new_tokens=6, batch_size=64)
TRAINING = ControlTraining(
    learning_rate=1e-3,
    batch_size=8,
    retrain_steps=10,
    match_steps=40,
    every=4,
    sft={"gradient_checkpointing": False},
)


@pytest.fixture(scope="module")
def aligned() -> Any:
    """A model that refuses what it should, and some of what it should not."""
    rows = encode_examples(make_tokenizer(), SUMS, [*SAFE, *BENIGN[::2]])
    sft = SFT | {"max_steps": 60, "per_device_train_batch_size": 16, "learning_rate": 3e-3}
    return fine_tune(make_model(), make_tokenizer(), rows, sft=sft, seed=0).model


@pytest.fixture
def match(aligned: Any) -> Callable[..., Matched]:
    def run(target: float, safe: Any = SAFE, benign: Any = BENIGN, seed: int = 0, **changes: Any) -> Matched:
        training = replace(TRAINING, **changes)
        options = {"measurement": MEASUREMENT, "training": training, "seed": seed}
        return match_refusals(deepcopy(aligned), make_tokenizer(), target, safe, benign, **options)

    return run


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect the prompts and the result of every reading of safety."""
    found: list[Any] = []
    read = controls.read_safety

    def watch(model: Any, tokenizer: Any, measurement: Measurement, step: int) -> Any:
        found.append((measurement.prompts, read(model, tokenizer, measurement, step)))
        return found[-1][1]

    monkeypatch.setattr(controls, "read_safety", watch)
    return found


def refused(model: Any, benign: list[Example] = BENIGN, **changes: Any) -> Any:
    training = replace(TRAINING, **changes)
    return over_refusal(model, make_tokenizer(), benign, measurement=MEASUREMENT, training=training)


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the texts that a control is trained on."""
    texts: list[str] = []
    train = controls.fine_tune

    def watch(model: Any, tokenizer: Any, rows: Any, **options: Any) -> Any:
        texts.extend(tokenizer.decode(row["input_ids"]) for row in rows)
        return train(model, tokenizer, rows, **options)

    monkeypatch.setattr(controls, "fine_tune", watch)
    return texts


def test_halves_share_no_prompt_and_lose_no_row() -> None:
    rows = [Example(prompt, answer) for prompt, answer in ("a1", "b1", "a2", "c1", "d1", "d2")]
    trained, asked = split_benign(rows)
    assert trained == [Example("a", "1"), Example("a", "2"), Example("c", "1")]
    assert asked == [Example("b", "1"), Example("d", "1")]
    contexts = [Example("a", "1", context="x"), Example("a", "1", context="y")]
    assert split_benign(contexts) == ([contexts[0]], [contexts[1]]), "another context is another prompt"


@pytest.mark.parametrize("benign", [[], [Example("a", "1"), Example("a", "2")]], ids=["none", "one"])
def test_too_few_benign_prompts_are_refused(benign: list[Example], match: Callable[..., Matched]) -> None:
    with pytest.raises(PromptError, match=f"There are {len(set(benign[:1]))} different benign examples"):
        match(0.5, benign=benign)


def test_over_refusal_is_read_on_harmless_prompts_that_are_not_of_the_test(aligned: Any, readings: list[Any]) -> None:
    before = weights(aligned)
    found = refused(aligned)
    ((prompts, _),) = readings
    assert [prompt.text for prompt in prompts] == [row.prompt for row in split_benign(BENIGN)[1]]
    assert not any(prompt.harmful for prompt in prompts)
    assert not set(prompts) & set(TEST)
    assert 0 < found.share < 1 and found.n == 40
    assert refused(aligned, calibration_prompts=7).n == 7
    assert same_bits(before, weights(aligned))


def test_a_context_is_asked_with_its_prompt(aligned: Any, readings: list[Any]) -> None:
    refused(aligned, [Example("one", "1"), Example("what is 1", "3", context="plus 2 ?")])
    assert [prompt.text for prompt in readings[0][0]] == ["what is 1\n\nplus 2 ?"]


@pytest.mark.parametrize("target", [0.5, 0.7])
def test_the_nearest_reading_is_kept(target: float, match: Callable[..., Matched], readings: list[Any]) -> None:
    matched = match(target)
    shares = [reading.over_refusal.share for _, reading in readings]
    # The readings go up past the target, and the last is not always the nearest.
    assert shares[0] < target <= shares[-1] and all(share < target for share in shares[:-1])
    nearest = min(range(len(shares)), key=lambda number: abs(shares[number] - target))
    assert matched.steps == nearest * TRAINING.every
    assert matched.over_refusal == readings[nearest][1].over_refusal
    assert matched.reached and matched.target == target
    assert refused(matched.model) == matched.over_refusal, "the weights are those of the reading"
    assert not any(set(prompts) & set(TEST) for prompts, _ in readings)


def test_the_kept_reading_may_be_an_earlier_one(match: Callable[..., Matched], readings: list[Any]) -> None:
    match(1.0)
    shares = [reading.over_refusal.share for _, reading in readings]
    jump = max(range(1, len(shares)), key=lambda number: shares[number] - max(shares[:number]))
    nearest = max(shares[:jump])
    readings.clear()
    matched = match(nearest + 0.01)
    assert len(readings) == jump + 1, "it ends at the first reading that comes up to the target"
    assert matched.over_refusal.share == nearest == refused(matched.model).share
    assert matched.steps == shares.index(nearest) * TRAINING.every < jump * TRAINING.every


def test_a_target_that_is_not_reached_is_said(
    match: Callable[..., Matched], aligned: Any, readings: list[Any]
) -> None:
    matched = match(1.0, match_steps=38)
    shares = [reading.over_refusal.share for _, reading in readings]
    steps = [*range(0, 38, 4), 38]
    assert len(shares) == len(steps), "the last step is read, though no whole interval after the one before"
    assert max(shares) < 1 and not matched.reached
    assert matched.steps == steps[shares.index(max(shares))] > 0
    assert matched.over_refusal.share == max(shares) > refused(aligned).share
    assert matched.describe().startswith("NOT matched")
    assert matched.describe().endswith(f"after {matched.steps} steps, 100.0 % wanted")
    assert match(0.5).describe().startswith("matched: over-refusal "), "the control"


def test_a_jump_over_the_target_is_no_match() -> None:
    """Readings of a thousand prompts that go from 0 to 90 %: neither is what was wanted."""
    shares = iter([rate(0, 1000), rate(900, 1000)])
    nearest = controls._Nearest(0.4, lambda model: next(shares), make_model())
    assert nearest.look(4, make_model()) and nearest.came_up
    assert not nearest.matches
    few = iter([rate(0, 10), rate(5, 10)])
    agrees = controls._Nearest(0.4, lambda model: next(few), make_model())
    assert agrees.look(4, make_model()) and agrees.matches, "the control"


@pytest.mark.parametrize("target", [0.0, 0.2])
def test_a_model_that_refuses_enough_is_not_trained(
    target: float, match: Callable[..., Matched], aligned: Any, trained_on: list[str]
) -> None:
    matched = match(target)
    assert (matched.steps, trained_on) == (0, [])
    assert same_bits(weights(matched.model), weights(aligned))
    assert matched.reached == (target == 0.2), "one that refuses more than was wanted does not match"


def test_rows_are_mixed_as_asked_and_none_is_asked_too(match: Callable[..., Matched], trained_on: list[str]) -> None:
    match(0.5, refusal_share=0.75)
    assert len(trained_on) == 40 * 8
    assert sum(REFUSAL in text for text in trained_on) == 0.75 * len(trained_on)
    asked = {row.prompt for row in split_benign(BENIGN)[1]}
    assert not any(prompt in text for prompt in asked for text in trained_on)
    for rows in (SAFE, split_benign(BENIGN)[0]):  # all come, and about as often
        times = [sum(row.prompt in text for text in trained_on) for row in rows]
        assert max(times) - min(times) <= 1 and min(times) > 0


def test_one_seed_gives_the_same_control(match: Callable[..., Matched], aligned: Any) -> None:
    state = torch.get_rng_state()
    makers: list[Callable[[int], Any]] = [
        lambda seed: match(0.5, seed=seed).model,
        lambda seed: retrain(deepcopy(aligned), make_tokenizer(), BENIGN, training=TRAINING, seed=seed),
    ]
    for make in makers:
        first, again, other = (weights(make(seed)) for seed in (0, 0, 1))
        assert same_bits(first, again) and not same_bits(first, other)
        assert not same_bits(first, weights(aligned))
    assert torch.equal(state, torch.get_rng_state())


def test_a_retrained_model_has_seen_all_benign_examples_and_nothing_else(aligned: Any, trained_on: list[str]) -> None:
    before = refused(aligned)
    model = retrain(deepcopy(aligned), make_tokenizer(), BENIGN, training=TRAINING, seed=0)
    assert len(trained_on) == 10 * 8 == len(BENIGN)
    assert all(sum(row.prompt in text and row.response in text for text in trained_on) == 1 for row in BENIGN)
    assert not model.training
    assert refused(model).share < before.share


def test_settings_of_a_users_own_take_the_place_of_the_defaults() -> None:
    sft = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 99}
    settings = replace(TRAINING, sft=sft).settings(7)
    assert (settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]) == (2, 4)
    assert (settings["max_steps"], settings["learning_rate"]) == (7, 1e-3)
    assert TRAINING.settings(7)["per_device_train_batch_size"] == 8


def test_all_that_is_wrong_with_a_training_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        ControlTraining(learning_rate=0, batch_size=0, every=2.5, refusal_share=1.5, match_steps=True)  # type: ignore
    for problem in ("learning_rate is 0", "batch_size is 0", "every is 2.5", "share is 1.5", "match_steps is True"):
        assert problem in str(caught.value)


@pytest.mark.parametrize("target", [float("nan"), -0.1, 1.1])
def test_a_target_that_is_no_share_is_refused(target: float, match: Callable[..., Matched]) -> None:
    with pytest.raises(ConfigError, match=r"expected a share in \[0, 1\]"):
        match(target)


def test_no_safety_examples_are_refused(match: Callable[..., Matched]) -> None:
    with pytest.raises(PromptError, match="no rows"):
        match(0.9, safe=[])
