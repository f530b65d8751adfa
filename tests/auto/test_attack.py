"""A short fine-tuning as a score: the figures of the stress test's own pieces, to the bit again and again."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lox_hf.auto.attack import ShortAttack
from lox_hf.errors import ConfigError, PromptError
from lox_hf.evaluation.data.prompts import load_prompts
from lox_hf.records import Score
from lox_hf.robustness.findings.curves import mean_asr
from lox_hf.robustness.measuring.measure import Measurement, ask_prompts, step_reading
from robustness import tiny_pair
from robustness.trainable import weights


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("pair")
    with tiny_pair.without_figures():
        tiny_pair.save_pair(folder)
        yield tiny_pair.write_rows(folder)


def load(pair: Path, name: str = "aligned") -> Any:
    return AutoModelForCausalLM.from_pretrained(pair / name)


def attack(pair: Path, **changes: Any) -> ShortAttack:
    measurement = Measurement(tuple(load_prompts(pair / "prompts.jsonl")), max_new_tokens=14)
    settings = {"learning_rate": 1e-2, "readings": 3, "max_steps": 6}
    return ShortAttack(
        tiny_pair.attack(pair), measurement, AutoTokenizer.from_pretrained(pair / "aligned"), **settings | changes
    )


def test_the_last_reading_and_the_mean_over_all(pair: Path) -> None:
    """By hand: the same model attacked anew for 2, 4 and 6 steps, and measured at the end of each."""
    model, measurement = load(pair), attack(pair).measurement
    readings = [step_reading(ask_prompts(model, attack(pair).tokenizer, measurement), 0)]
    for steps in (2, 4, 6):
        model = load(pair)
        attack(pair, max_steps=steps, readings=1).score(model)
        report = ask_prompts(model, attack(pair).tokenizer, measurement)
        readings.append(step_reading(report, steps))
    score = attack(pair).score(load(pair))
    assert score.rates["asr"] == report.asr
    assert score.marks == Score.of(report).marks
    assert score.figures["asr_mean"] == mean_asr(readings)
    shares = [reading.asr.share for reading in readings]
    assert shares[0] < 0.5 <= max(shares), "the attack costs this model its refusals"
    first = next(place for place, share in enumerate(shares) if share >= 0.5)
    assert 2 * (first - 1) < score.figures["steps_to_half"] <= 2 * first


def test_half_is_missing_where_it_is_not_reached(pair: Path) -> None:
    score = attack(pair, learning_rate=1e-6).score(load(pair))
    assert score.rates["asr"].share < 0.5
    assert "steps_to_half" not in score.figures
    assert math.isnan(score.value("steps_to_half"))
    assert Score.from_json(score.to_json()) == score


def test_one_seed_gives_the_same_to_the_bit(pair: Path) -> None:
    found = []
    for seed in (0, 0, 1):
        model = load(pair)
        found.append((attack(pair, seed=seed).score(model), weights(model)))
        torch.rand(3)  # what happens in between makes no difference
    (first, ours), (second, theirs), (_, others) = found
    assert first == second
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(not torch.equal(ours[name], others[name]) for name in ours)


def test_the_model_is_the_attacked_one_afterwards(pair: Path) -> None:
    model = load(pair)
    before = weights(model)
    attack(pair).score(model)
    assert any(not torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_adapters_are_merged(pair: Path) -> None:
    lora = {"r": 2, "target_modules": ["q_proj"]}
    model = load(pair)
    before = weights(model)
    tuned = ShortAttack(tiny_pair.attack(pair, lora=lora), attack(pair).measurement, attack(pair).tokenizer)
    assert tuned.score(model).rates["asr"].n == 8
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(before[name], weight)}
    assert changed == {"model.layers.0.self_attn.q_proj.weight"}


def test_steps_are_the_attacks_own_unless_they_are_said(pair: Path) -> None:
    assert attack(pair).steps() == 6
    assert attack(pair, max_steps=None).steps() == tiny_pair.SFT["max_steps"]


def test_settings_are_what_a_score_depends_on(pair: Path, tmp_path: Path) -> None:
    settings = attack(pair).settings()
    assert json.loads(json.dumps(settings)) == settings
    elsewhere = tiny_pair.write_rows(tmp_path)
    same = ShortAttack(tiny_pair.attack(elsewhere), attack(pair).measurement, attack(pair).tokenizer, 1e-2, 0, 3, 6)
    assert same.settings() == settings, "the rows count, wherever they lie"
    changes: list[dict[str, Any]] = [{"learning_rate": 1.0}, {"seed": 1}, {"readings": 2}, {"max_steps": 5}]
    assert all(attack(pair, **change).settings() != settings for change in changes)
    rows = elsewhere / "attack.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[1:]))
    fewer = ShortAttack(tiny_pair.attack(elsewhere), attack(pair).measurement, attack(pair).tokenizer, 1e-2, 0, 3, 6)
    assert fewer.settings() != settings


def test_what_cannot_be_trained_on_is_said(pair: Path, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"attack\.jsonl"):
        ShortAttack(tiny_pair.attack(tmp_path), attack(pair).measurement, attack(pair).tokenizer).steps()
    with pytest.raises(ConfigError, match="max_steps is 0, expected a positive integer"):
        attack(pair, max_steps=0).score(load(pair))
