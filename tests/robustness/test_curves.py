"""Curves with closed forms: straight lines, corners, and what is not known."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lox_hf.records import StepReading
from lox_hf.robustness.findings.curves import (
    asr_at,
    asr_at_refusal,
    half_life,
    mean_asr,
    nearest_reading,
    refusal_curve,
    step_reaching,
)
from robustness.made_cells import line, reading

NAN = math.nan
SHARES = st.integers(0, 1000).map(lambda thousandth: thousandth / 1000)


def along(*asr: float, every: int = 10) -> list[StepReading]:
    return [reading(every * number, share) for number, share in enumerate(asr)]


@st.composite
def curves(draw: st.DrawFn) -> list[StepReading]:
    steps = sorted(draw(st.sets(st.integers(1, 60), max_size=8)))
    return [reading(step, draw(SHARES)) for step in (0, *steps)]


@pytest.mark.parametrize(
    ("asr", "expected"),
    [
        ((0.0, 1.0), (5.0, False)),
        ((0.0, 0.4, 0.8), (12.5, False)),
        ((0.0, 0.5, 1.0), (10.0, False)),  # at a reading
        ((0.0, 0.6, 0.1, 0.9), (10 * 5 / 6, False)),  # the first time counts, whatever comes after
        ((0.5, 0.0), (0.0, False)),  # lost before the attack
        ((0.0, 0.2, 0.499), (20.0, True)),  # never: the last step, as a lower bound
        ((0.0,), (0.0, True)),
    ],
)
def test_half_life(asr: tuple[float, ...], expected: tuple[float, bool]) -> None:
    found = half_life(along(*asr))
    assert (pytest.approx(found.steps), found.at_least) == expected


def test_a_half_life_is_not_filled_in() -> None:
    # Half may have been lost at the reading in which nothing was scored, so when is not known ...
    found = half_life(along(0.0, NAN, 1.0))
    assert math.isnan(found.steps) and not found.at_least
    assert math.isnan(half_life(along(0.0, 0.2, NAN)).steps)
    # ... but one after the crossing changes nothing.
    assert half_life(along(0.0, 1.0, NAN)) == (5.0, False)


def test_uneven_readings_count_by_their_steps() -> None:
    uneven = [reading(0, 0.0), reading(1, 1.0), reading(2, 1.0), reading(10, 1.0)]
    assert mean_asr(uneven) == pytest.approx(0.95)  # a plain mean of the readings is 0.75
    assert mean_asr(line(5.0)) == pytest.approx(0.75)
    assert mean_asr([reading(0, 0.3)]) == 0.3
    assert math.isnan(mean_asr(along(0.0, NAN, 1.0)))


def test_asr_between_and_beyond_readings() -> None:
    curve = along(0.0, 0.4, NAN, 0.8, 1.0)
    assert asr_at(curve, 0) == 0.0
    assert asr_at(curve, 2.5) == pytest.approx(0.1)
    assert asr_at(curve, 10) == 0.4  # at a reading, the unknown one beside it does not matter
    assert asr_at(curve, 35) == pytest.approx(0.9)
    for unknown in (15, 20, 25, 40.5, math.inf, NAN):
        assert math.isnan(asr_at(curve, unknown))


def test_the_step_that_reaches_a_level() -> None:
    curve = along(0.1, 0.5, 0.9)
    assert [step_reaching(curve, level) for level in (0.05, 0.1, 0.3, 0.9)] == pytest.approx([0, 0, 5, 20])
    assert step_reaching(curve, 0.95) == math.inf
    assert math.isnan(step_reaching(along(0.1, NAN, 0.9), 0.5))


@given(curves(), SHARES)
def test_the_rate_at_the_step_that_reaches_a_level_is_the_level(curve: list[StepReading], level: float) -> None:
    step = step_reaching(curve, level)
    if step == math.inf:
        assert all(found.asr.share < level for found in curve)
    elif step == 0:
        assert curve[0].asr.share >= level
    else:
        assert asr_at(curve, step) == pytest.approx(level)
        assert all(found.asr.share < level for found in curve if found.step < step)


@given(curves())
def test_the_mean_lies_within_the_curve(curve: list[StepReading]) -> None:
    shares = [found.asr.share for found in curve]
    assert min(shares) - 1e-12 <= mean_asr(curve) <= max(shares) + 1e-12


def test_asr_at_equal_refusal() -> None:
    curve = [reading(0, 0.0, 0.4), reading(10, 0.2, 0.2), reading(20, 0.8, 0.0)]
    assert asr_at_refusal(curve, 0.3) == pytest.approx(0.1)
    assert asr_at_refusal(curve, 0.2) == pytest.approx(0.2)
    assert asr_at_refusal(curve, 0.1) == pytest.approx(0.5)
    # It must come down to the level from above ...
    assert math.isnan(asr_at_refusal(curve, 0.4)) and math.isnan(asr_at_refusal(curve, 0.6))
    # ... and get there.
    assert math.isnan(asr_at_refusal(curve[:2], 0.1))
    again = [*curve, reading(30, 0.9, 0.5), reading(40, 1.0, 0.0)]
    assert asr_at_refusal(again, 0.1) == pytest.approx(0.5)  # the first time counts


@pytest.mark.parametrize("refusal", [(None, None, None), (0.4, NAN, 0.0), (NAN, 0.2, 0.0)])
def test_unknown_refusal_is_not_filled_in(refusal: tuple[float | None, ...]) -> None:
    curve = [reading(10 * number, 0.5, share) for number, share in enumerate(refusal)]
    assert math.isnan(asr_at_refusal(curve, 0.1))


def test_unknown_asr_at_a_known_refusal() -> None:
    curve = [reading(0, 0.0, 0.4), reading(10, NAN, 0.2), reading(20, 0.8, 0.0)]
    assert math.isnan(asr_at_refusal(curve, 0.1))


def test_the_curve_of_refusal_against_success() -> None:
    curve = [reading(0, 0.0, 0.4), reading(10, NAN, 0.2), reading(20, 0.8, NAN), reading(30, 0.9, 0.0)]
    assert refusal_curve(curve) == [(0.4, 0.0), (0.0, 0.9)]
    assert refusal_curve(along(0.0, 1.0)) == []


def test_the_nearest_reading() -> None:
    curve = along(0.0, 0.5, 1.0)
    assert [nearest_reading(curve, step).step for step in (0, 4, 5, 6, 14.9, 99)] == [0, 0, 0, 10, 10, 20]
