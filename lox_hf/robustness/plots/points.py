"""From runs to what a figure draws: means over seeds with their intervals. No matplotlib here."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from lox_hf.records import AttackOutcome, CellResult, Rate, StepReading, StressReport
from lox_hf.robustness.plots.looks import ordered

ENOUGH_FOR_BANDS = 5
"""With three seeds Student's t gives an interval from 0 to 100 %."""


class Estimate(NamedTuple):
    """A mean over seeds with its 95 % interval, all in [0, 1]; NaN where nothing was measured."""

    mean: float
    low: float
    high: float


def estimate(rates: Sequence[Rate]) -> Estimate:
    """Return the mean of one rate over seeds with a 95 % interval.

    The interval is Student's t over the seeds, and never narrower than the seeds' own Wilson intervals are on average:
    three seeds at 0 of 100 are not certainly 0. For a single seed it is that seed's Wilson interval.

    Args:
        rates: The rate of every seed; those of which nothing was scored do not count.

    Returns:
        The mean and the interval.

    Example:
        >>> estimate([Rate(50, 100, 0.5, 0.4, 0.6)])
        Estimate(mean=0.5, low=0.4, high=0.6)
    """
    known = [rate for rate in rates if rate.n]
    if not known:
        return Estimate(math.nan, math.nan, math.nan)
    mean = statistics.fmean(rate.share for rate in known)
    low = statistics.fmean(rate.low for rate in known)
    high = statistics.fmean(rate.high for rate in known)
    if len(known) > 1:
        from scipy.stats import t

        error = statistics.stdev(rate.share for rate in known) / math.sqrt(len(known))
        half = float(t.ppf(0.975, len(known) - 1)) * error
        low, high = min(low, mean - half), max(high, mean + half)
    return Estimate(mean, max(low, 0.0), min(high, 1.0))


def estimates_by_step(cells: Sequence[CellResult], rate_of: Callable[[StepReading], Rate]) -> dict[int, Estimate]:
    """Return a rate along an attack, for the steps at which every seed has a reading in which it is known.

    Args:
        cells: Runs of one model under one attack, one per seed.
        rate_of: The rate of a reading.

    Returns:
        Step -> mean and interval over the seeds, by step.
    """
    by_step = [{reading.step: rate_of(reading) for reading in cell.readings} for cell in cells]
    shared = sorted(set.intersection(*map(set, by_step))) if by_step else []
    rates = {step: [own[step] for own in by_step] for step in shared}
    return {step: estimate(found) for step, found in rates.items() if all(rate.n for rate in found)}


def refused_and_asr(cell: CellResult) -> list[tuple[float, float]]:
    """Return over-refusal and attack success rate along a run, in percent, where both are known."""
    known = (reading for reading in cell.readings if reading.over_refusal.n and reading.asr.n)
    return [(100 * reading.over_refusal.share, 100 * reading.asr.share) for reading in known]


def cells_of(report: StressReport, outcome: AttackOutcome) -> list[CellResult]:
    """Return the runs that an outcome's safety sums up: at its worst learning rate, where utility did not collapse."""
    return [cell for cell in runs_of(report, outcome) if cell.seed not in outcome.collapsed]


def runs_of(report: StressReport, outcome: AttackOutcome) -> list[CellResult]:
    """Return all runs at the learning rate that is worst for an outcome's model, of use afterwards or not."""
    wanted = outcome.model, outcome.attack, outcome.learning_rate
    return [cell for cell in report.cells if (cell.model, cell.attack, cell.learning_rate) == wanted]


def has_bands(report: StressReport) -> bool:
    """Tell whether there are seeds enough for an interval of their mean to say more than the seeds do."""
    return len(report.seeds) >= ENOUGH_FOR_BANDS


def models_of(report: StressReport) -> list[str]:
    """Return all models of a report in the order in which a reader wants them; its parts keep it."""
    return ordered([*(before.model for before in report.before), *(outcome.model for outcome in report.outcomes)])


def of_attack(report: StressReport, attack: str) -> StressReport:
    """Return the part of a report that is about one attack; a figure of it has one panel and the same colours."""
    outcomes = tuple(outcome for outcome in report.outcomes if outcome.attack == attack)
    return replace(report, outcomes=outcomes, cells=tuple(cell for cell in report.cells if cell.attack == attack))


def outcomes_by_attack(report: StressReport) -> dict[str, list[AttackOutcome]]:
    """Return the outcomes of every attack, in the order in which a reader wants the models."""
    place = {model: number for number, model in enumerate(models_of(report))}
    found: dict[str, list[AttackOutcome]] = {}
    for outcome in report.outcomes:
        found.setdefault(outcome.attack, []).append(outcome)
    return {attack: sorted(own, key=lambda outcome: place[outcome.model]) for attack, own in found.items()}


def utility_floor(report: StressReport) -> float:
    """Return the least share of utility that a figure has to show: 0.8, as most keep most of it, or the least kept."""
    kept = [value for outcome in report.outcomes for value in outcome.utility_kept.values]
    return min([0.8, *(value for value in kept if not math.isnan(value))])
