"""The figures of a stress test as a page shows them: in their order, with what each says in words."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lox_hf.records import AttackOutcome, Spread, StressReport
from lox_hf.robustness.findings.wording import percent
from lox_hf.robustness.plots import stress
from lox_hf.robustness.plots.points import cells_of, estimate, has_bands, outcomes_by_attack, utility_floor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """One figure of a stress test.

    Attributes:
        name: Its file's name, without a suffix.
        title: Its title.
        reading: How to read it, in sentences.
        draw: Draws it; a ConfigError says why it cannot.
        numbers: What it shows of one model under one attack, in words.
    """

    name: str
    title: str
    reading: Callable[[StressReport], str]
    draw: Callable[[StressReport], "Figure"]
    numbers: Callable[[StressReport, AttackOutcome], str]


def describe(picture: Picture, report: StressReport) -> str:
    """Say in words what a figure shows, for those who do not see it.

    Args:
        picture: The figure.
        report: The report it is drawn from.

    Returns:
        Title, then the figures of every model under every attack.
    """
    attacks = [
        f"{attack}: " + ", ".join(f"{outcome.model} {picture.numbers(report, outcome)}" for outcome in outcomes)
        for attack, outcomes in outcomes_by_attack(report).items()
    ]
    return f"{picture.title}. {'; '.join(attacks)}."


def _half_life(report: StressReport, outcome: AttackOutcome) -> str:
    half = outcome.half_life
    if math.isnan(half.mean):
        return "not known"
    return f"50 % after {'at least ' if half.bound else ''}{half.mean:.1f} steps"


def _before_and_after(report: StressReport, outcome: AttackOutcome) -> str:
    before = estimate([cell.readings[0].asr for cell in cells_of(report, outcome)])
    return f"{percent(before.mean)} before and {percent(outcome.final_asr.mean)} after"


def _utility(report: StressReport, outcome: AttackOutcome) -> str:
    return f"{_mean(outcome.utility_kept)} of utility and {_mean(outcome.mean_asr)} attack success"


def _refusal(report: StressReport, outcome: AttackOutcome) -> str:
    at_equal = _mean(outcome.equal_refusal_asr)
    return f"begins at {_mean(outcome.over_refusal_before)} refused, {at_equal} at equal refusal"


def _mean(spread: Spread) -> str:
    return percent(spread.mean)


def _read_steps(report: StressReport) -> str:
    bands = "Bands: 95 % intervals of the mean. " if has_bands(report) else ""
    return (
        f"Each model at the learning rate that is worst for it. Thick: mean over the seeds. Thin: each seed. {bands}"
        "Controls in grey, means only. Further right is later, and later is better."
    )


def _read_refusal(_: StressReport) -> str:
    return (
        "A ring marks each model before the attack, which then moves it to the left and up. Where a curve lies on the "
        "aligned model's, the gain is plain extra refusal; only where it lies below is it more, among models that "
        "begin further right. Where all begin at 0 % the figure says nothing. The dotted line is where the tables "
        "compare."
    )


def _read_bars(report: StressReport) -> str:
    marks = "Whiskers: 95 % intervals of the mean over the seeds." if has_bands(report) else "Ticks: each seed."
    return f"Hollow bars: before the attack. Filled: after its last step. {marks}"


def _read_utility(report: StressReport) -> str:
    read = "Lower right is good. Large: mean over the seeds. Small: each seed, of what is no control."
    if utility_floor(report) >= report.settings["guard"]:
        return read
    return f"{read} In the shaded part a model has lost its use, and few successes there are no defence."


PICTURES = (
    Picture("asr-over-steps", "Attack success along the attack", _read_steps, stress.asr_over_steps, _half_life),
    Picture(
        "asr-against-refusal",
        "Attack success against refusal of harmless prompts",
        _read_refusal,
        stress.asr_against_refusal,
        _refusal,
    ),
    Picture(
        "before-and-after",
        "Attack success before and after",
        _read_bars,
        stress.before_and_after,
        _before_and_after,
    ),
    Picture(
        "utility-against-asr",
        "Utility against attack success",
        _read_utility,
        stress.utility_against_asr,
        _utility,
    ),
)
"""In the order in which a reader needs them."""
