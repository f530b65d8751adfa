"""When a watched figure has gone too far, as data."""

import math
from typing import Any

import pytest

from lox_hf.records import DriftReading, ProbeReading, TrainingReading
from lox_hf.statistics import rate
from lox_hf.training.thresholds import NEEDS, Threshold


def reading(retention: float, step: int = 0, **changes: Any) -> TrainingReading:
    return TrainingReading(step, 0.0, "step", DriftReading(retention=retention), **changes)


@pytest.mark.parametrize(
    ("limits", "value", "crossed"),
    [
        ({"below": 0.6}, 0.59, True),
        ({"below": 0.6}, 0.6, False),
        ({"above": 0.6}, 0.61, True),
        ({"above": 0.6}, 0.6, False),
        ({"below": 0.0}, -0.1, True),
        ({"below": 0.6}, math.nan, False),
        ({"above": 0.6}, math.inf, True),
        ({}, 0.1, False),
    ],
)
def test_is_crossed(limits: dict[str, float], value: float, crossed: bool) -> None:
    assert Threshold(**limits).is_crossed(reading(value)) is crossed


def test_every_figure_can_be_watched_and_one_that_was_not_measured_is_not_crossed() -> None:
    full = TrainingReading(
        0,
        0.0,
        "step",
        DriftReading(0.5, 0.5, 0.5, 0.5),
        ProbeReading(rate(1, 2), rate(1, 2), refusal_perplexity=0.5),
    )
    for metric in NEEDS:
        assert Threshold(metric, below=0.6).is_crossed(full), metric
        assert Threshold(metric, below=0.6).is_crossed(reading(0.5)) == (metric == "retention")


@pytest.mark.parametrize(
    ("patience", "values", "due"),
    [
        (1, [0.5], True),
        (1, [0.5, 0.7], False),
        (2, [0.5], False),
        (2, [0.5, 0.5], True),
        (2, [0.5, 0.7, 0.5], False),
        (2, [0.7, 0.5, 0.5, 0.5], True),
        (2, [0.5, math.nan, 0.5], True),
        (2, [0.7, math.nan, 0.5], False),
        (1, [0.5, math.nan], False),
        (1, [], False),
    ],
)
def test_patience_counts_readings_in_a_row(patience: int, values: list[float], due: bool) -> None:
    readings = [reading(value, step) for step, value in enumerate(values)]
    assert Threshold(below=0.6, patience=patience).is_due(readings) is due


def test_a_correction_ends_a_row() -> None:
    threshold = Threshold(below=0.6, patience=2)
    plain, corrected = reading(0.5), reading(0.5, reapplied=0.4)
    assert threshold.is_due([plain, plain])
    assert not threshold.is_due([plain, corrected, plain])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"metric": "retentoin"}, "expected one of retention, r_ft"),
        ({"below": 0.1, "above": 0.2}, "given twice"),
        ({"below": math.nan}, "below is nan"),
        ({"above": "high"}, "above is 'high'"),
        ({"below": True}, "below is True"),
        ({"patience": 0}, "patience is 0"),
        ({"patience": 1.5}, "patience is 1.5"),
        ({"patience": True}, "patience is True"),
    ],
)
def test_problems(settings: dict[str, Any], words: str) -> None:
    (found,) = Threshold(**settings).problems()
    assert words in found


def test_no_problems_with_a_good_one() -> None:
    assert not Threshold("asr", above=0.2, patience=3).problems()
    assert str(Threshold("asr", above=0.2)) == "asr above 0.2"
    assert str(Threshold(below=0.6)) == "retention below 0.6"
