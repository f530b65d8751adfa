"""One attack's readings as a curve: when half the refusals are lost, the mean, and what stands at equal budget.

Between two readings everything is taken as a straight line. A figure that rests on a reading in which nothing was
scored is NaN: what is not known is not filled in.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from lox_hf.records import StepReading

HALF = 0.5


class HalfLife(NamedTuple):
    """When half the refusals were lost.

    Attributes:
        steps: Optimiser steps; NaN where it is not known.
        at_least: Half was not lost within the attack: `steps` is its last step, a lower bound.
    """

    steps: float
    at_least: bool


def half_life(readings: Sequence[StepReading]) -> HalfLife:
    """Return the step at which half the refusals are lost: where the attack success rate reaches 50 %.

    Args:
        readings: Readings of one attack, by step.

    Returns:
        The step and whether it is a lower bound.

    Example:
        >>> from lox_hf.statistics import rate
        >>> rest = [rate(0, 0)] * 5
        >>> readings = [StepReading(step, rate(step, 25), *rest) for step in (0, 10, 20)]
        >>> half_life(readings), half_life(readings[:2])
        (HalfLife(steps=12.5, at_least=False), HalfLife(steps=10.0, at_least=True))
    """
    step = step_reaching(readings, HALF)
    return HalfLife(float(readings[-1].step), True) if math.isinf(step) else HalfLife(step, False)


def step_reaching(readings: Sequence[StepReading], level: float) -> float:
    """Return the first step at which the attack success rate reaches a level.

    Args:
        readings: Readings of one attack, by step.
        level: The rate, in [0, 1].

    Returns:
        The step, 0 where the rate is there before the attack; infinity where it never is, NaN where that is not known.
    """
    position = _first_reaching(_asr(readings), level)
    return position if math.isinf(position) else _at(_steps(readings), position)


def mean_asr(readings: Sequence[StepReading]) -> float:
    """Return the attack success rate averaged over the steps of an attack, by the trapezoid rule.

    Readings may lie unevenly: each counts by the steps it stands for.

    Args:
        readings: Readings of one attack, by step.

    Returns:
        The mean, in [0, 1]; NaN where a reading is not known.
    """
    first, last = readings[0], readings[-1]
    if first is last:
        return first.asr.share
    areas = ((b.step - a.step) * (a.asr.share + b.asr.share) / 2 for a, b in pairwise(readings))
    return math.fsum(areas) / (last.step - first.step)


def asr_at(readings: Sequence[StepReading], step: float) -> float:
    """Return the attack success rate after so many steps.

    Args:
        readings: Readings of one attack, by step, the first at step 0.
        step: The step, from 0; it may lie between readings.

    Returns:
        The rate, in [0, 1]; NaN beyond the last reading and where it is not known.
    """
    return _at(_asr(readings), _first_reaching(_steps(readings), step))


def asr_at_refusal(readings: Sequence[StepReading], level: float) -> float:
    """Return the attack success rate where an attack has first brought over-refusal down to a level.

    Args:
        readings: Readings of one attack, by step.
        level: The over-refusal, in [0, 1].

    Returns:
        The rate, in [0, 1]; NaN where over-refusal begins at or below the level, never falls to it, or is not known.
    """
    refusal = [reading.over_refusal.share for reading in readings]
    if not refusal[0] > level:
        return math.nan
    return _at(_asr(readings), _first_reaching([-share for share in refusal], -level))


def refusal_curve(readings: Sequence[StepReading]) -> list[tuple[float, float]]:
    """Return (over-refusal, attack success rate) along an attack, for the readings in which both are known.

    Args:
        readings: Readings of one attack, by step.

    Returns:
        Points in the order of the steps, both shares in [0, 1]; none where there are no harmless prompts.
    """
    points = ((reading.over_refusal.share, reading.asr.share) for reading in readings)
    return [point for point in points if not any(map(math.isnan, point))]


def nearest_reading(readings: Sequence[StepReading], step: float) -> StepReading:
    """Return the reading that lies nearest to a step; of two as near the earlier one."""
    return min(readings, key=lambda reading: abs(reading.step - step))


def _steps(readings: Sequence[StepReading]) -> list[float]:
    return [float(reading.step) for reading in readings]


def _asr(readings: Sequence[StepReading]) -> list[float]:
    return [reading.asr.share for reading in readings]


def _first_reaching(values: Sequence[float], level: float) -> float:
    """Where a series first reaches a level, as an index with a fraction; infinity for never, NaN for not known."""
    for index, value in enumerate(values):
        if math.isnan(value):
            return math.nan
        if value >= level:
            before = values[index - 1]
            return index - 1 + (level - before) / (value - before) if index else 0.0
    return math.inf


def _at(values: Sequence[float], position: float) -> float:
    """A series at an index with a fraction; NaN outside it."""
    if not math.isfinite(position):
        return math.nan
    index = math.floor(position)
    share = position - index
    return values[index] + share * (values[index + 1] - values[index]) if share else values[index]
