"""What is measured of a candidate: the very figures of the functions that it calls."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from lox_hf.auto.measures import CandidateMeasures
from lox_hf.evaluation.data.prompts import Prompt
from lox_hf.evaluation.divergence import answer_reference, divergence
from lox_hf.evaluation.utility import perplexity
from lox_hf.records import Score, UtilityScore
from lox_hf.robustness.measuring.measure import Measurement, ask_prompts
from lox_hf.statistics import rate
from robustness.trainable import make_model, make_tokenizer, sums

HARMFUL = tuple(Prompt(row.prompt) for row in sums()[3:8])
HARMLESS = tuple(Prompt(row.prompt, harmful=False, reference=row.response) for row in sums()[:3])


def measures(model: Any = None, **changes: Any) -> CandidateMeasures:
    measurement = Measurement(**{"prompts": HARMFUL + HARMLESS, "max_new_tokens": 6, "batch_size": 4} | changes)
    tokenizer = make_tokenizer()
    reference = None if model is None else answer_reference(model, tokenizer, measurement.prompts, tokens=4)
    return CandidateMeasures(measurement, tokenizer, reference)


def moved() -> Any:
    """Another model of the same shape."""
    model = make_model()
    for weight in model.parameters():
        weight.data.mul_(1.5)
    return model


def test_a_score_is_what_the_functions_say() -> None:
    model, other = make_model(), moved()
    found = measures(model)
    score = found.score(other)
    report = ask_prompts(other, make_tokenizer(), found.measurement)
    assert {name: score.rates[name] for name in ("asr", "over_refusal", "accuracy")} == {
        "asr": report.asr,
        "over_refusal": report.over_refusal,
        "accuracy": report.accuracy,
    }
    assert score.marks == Score.of(report).marks
    assert score.figures == {"kl": divergence(other, found.reference).kl}  # pyrefly: ignore
    assert score.figures["kl"] > 0
    assert found.score(model).figures == {"kl": 0.0}
    assert Score.from_json(score.to_json()) == score


def test_perplexity_is_a_figure(tmp_path: Path) -> None:
    path, model = tmp_path / "texts.txt", make_model()
    path.write_text("\n".join(row.prompt for row in sums()))
    score = measures(utility="perplexity", utility_data=str(path)).score(model)
    expected = perplexity(model, make_tokenizer(), path, progressbar=False).perplexity
    assert score.figures == {"perplexity": expected}
    assert measures().score(model).figures == {}, "nothing is measured that was not asked for"


def test_gsm8k_is_a_rate_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside known answers; how it is asked is a test of `measure_utility`."""
    utility = UtilityScore("gsm8k", rate(3, 10))
    monkeypatch.setattr("lox_hf.auto.measures.measure_utility", lambda *_: utility)
    score = measures().score(make_model())
    assert score.rates["gsm8k"] == utility.accuracy
    assert score.rates["accuracy"].n == len(HARMLESS)
    assert "gsm8k" not in score.marks


def test_settings_are_what_a_score_depends_on() -> None:
    model = make_model()
    settings = measures(model).settings()
    assert json.loads(json.dumps(settings)) == settings
    assert measures(copy.deepcopy(model), batch_size=2).settings() == settings
    others = [measures(), measures(moved()), measures(model, max_new_tokens=7), measures(model, prompts=HARMLESS)]
    assert all(other.settings() != settings for other in others)
