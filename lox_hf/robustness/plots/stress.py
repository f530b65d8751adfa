"""Figures of a stress test: a function each, from the report to a figure with a panel per attack."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lox_hf.errors import ConfigError
from lox_hf.plots.style import (
    GREY,
    INK,
    PERCENT,
    QUARTERS,
    finish_with_legend,
    house_style,
    panels,
    shown,
    swatch,
    whole_steps,
)
from lox_hf.records import AttackOutcome, StepReading, StressReport
from lox_hf.robustness.plots import marks
from lox_hf.robustness.plots.looks import Look, looks, ordered
from lox_hf.robustness.plots.points import cells_of, has_bands, models_of, outcomes_by_attack, runs_of, utility_floor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_HEIGHT_IN = 3.1
ASR_LABEL = "attack success rate (%)"


def asr_over_steps(report: StressReport) -> "Figure":
    """Draw the attack success rate along every attack, each model at the learning rate that is worst for it.

    Args:
        report: The report, with its runs.

    Returns:
        Means over the seeds; of the aligned and the hardened models the seeds as thin lines and, from five seeds on,
        95 % intervals as bands too.

    Raises:
        ConfigError: If no run has a known attack success rate, or matplotlib is not installed.
    """
    _require_asr(report, "The attack success rate over the steps")

    def mark(axes: "Axes", outcome: AttackOutcome, look: Look) -> Any:
        return marks.curve_over_steps(axes, cells_of(report, outcome), look, has_bands(report))

    def finish(axes: "Axes") -> None:
        axes.axhline(50, color=INK, linewidth=0.7, linestyle=":", zorder=1)
        axes.set(xlabel="optimiser steps of the attack", ylim=PERCENT, yticks=QUARTERS)
        whole_steps(axes)

    return _figure(report, mark, finish, ASR_LABEL)


def before_and_after(report: StressReport) -> "Figure":
    """Draw the attack success rate before every attack and after its last step.

    Args:
        report: The report, with its runs.

    Returns:
        Two bars per model: means over the seeds with their 95 % intervals, or with the seeds where they are few.

    Raises:
        ConfigError: If no run has a known attack success rate, or matplotlib is not installed.
    """
    _require_asr(report, "The attack success rate before and after")
    style, found = looks(models_of(report)), outcomes_by_attack(report)
    with house_style():
        models = ordered(outcome.model for outcome in report.outcomes)
        figure, all_axes = panels(list(found), 0.46 * len(models) + 0.9, title_width=30)
        for axes, outcomes in zip(all_axes, found.values(), strict=True):
            for outcome in outcomes:
                row = models.index(outcome.model)
                marks.bars(axes, row, cells_of(report, outcome), style[outcome.model], has_bands(report))
            axes.set(xlabel=ASR_LABEL, xlim=(0, 102), ylim=(len(models) - 0.5, -0.5))
            axes.set_yticks(range(len(models)), [shown(model, 30) for model in models])
            axes.grid(visible=False, axis="y")
        kinds = [swatch("none", GREY), swatch(GREY, GREY)]
        finish_with_legend(figure, kinds, ["before the attack", "after its last step"])
    return figure


def utility_against_asr(report: StressReport) -> "Figure":
    """Draw what is left of utility after every attack against the attack success rate: the lower right is good.

    Args:
        report: The report.

    Returns:
        A large marker is the mean over the seeds, small ones are the seeds of the aligned and the hardened models.
        Left of the guard a model has lost its use, and few successes are no defence.

    Raises:
        ConfigError: If utility was not measured, or matplotlib is not installed.
    """
    kept = [value for outcome in report.outcomes for value in outcome.utility_kept.values if not math.isnan(value)]
    if not kept:
        raise ConfigError("Utility against attack success is not drawn: utility was not measured.")
    left, right = 100 * utility_floor(report) - 4, 100 * max(1.0, *kept) + 4
    guard = report.settings.get("guard")

    def mark(axes: "Axes", outcome: AttackOutcome, look: Look) -> Any:
        return marks.utility_point(axes, outcome, runs_of(report, outcome), look)

    def finish(axes: "Axes") -> None:
        if isinstance(guard, float):
            axes.axvspan(-10, 100 * guard, color=INK, alpha=0.08, linewidth=0, zorder=0)
        axes.set(xlabel="utility kept (% of the aligned model's)", xlim=(left, right), ylim=PERCENT, yticks=QUARTERS)

    return _figure(report, mark, finish, "attack success rate,\nmean over the attack (%)")


def asr_against_refusal(report: StressReport) -> "Figure":
    """Draw the attack success rate against the refusal of harmless prompts along every attack.

    An attack moves a model from the lower right to the upper left. Where a curve lies below the aligned model's, fewer
    attacks succeed at the same number of harmless prompts refused; where it lies on it, the gain is extra refusal.

    Args:
        report: The report, with its runs.

    Returns:
        Means over the seeds with a ring at step 0; of the aligned and the hardened models the seeds as thin lines too.

    Raises:
        ConfigError: If no harmless prompts were asked, or matplotlib is not installed.
    """
    if not _any_reading(report, lambda reading: reading.over_refusal.n and reading.asr.n):
        raise ConfigError(
            "The attack success rate at equal refusal of harmless prompts is not drawn: no harmless prompts were "
            "asked. Whether a gain is more than extra refusal cannot be told without them."
        )
    level = report.settings.get("refusal_level")

    def mark(axes: "Axes", outcome: AttackOutcome, look: Look) -> Any:
        return marks.curve_over_refusal(axes, cells_of(report, outcome), look)

    def finish(axes: "Axes") -> None:
        if isinstance(level, float):
            axes.axvline(100 * level, color=INK, linewidth=0.7, linestyle=":", zorder=1)
        axes.set(xlabel="harmless prompts refused (%); ring: before the attack", ylim=PERCENT, yticks=QUARTERS)
        axes.set_xlim(left=-2)

    return _figure(report, mark, finish, ASR_LABEL)


def _figure(
    report: StressReport,
    mark: Callable[["Axes", AttackOutcome, Look], Any],
    finish: Callable[["Axes"], None],
    y_label: str,
) -> "Figure":
    """A panel per attack with a mark per model, and one legend."""
    style, found = looks(models_of(report)), outcomes_by_attack(report)
    with house_style():
        figure, all_axes = panels(list(found), PANEL_HEIGHT_IN, y_label)
        handles: dict[str, Any] = {}
        for axes, outcomes in zip(all_axes, found.values(), strict=True):
            for outcome in outcomes:
                handles[outcome.model] = mark(axes, outcome, style[outcome.model])
            finish(axes)
        finish_with_legend(figure, list(handles.values()), list(handles))
    return figure


def _require_asr(report: StressReport, figure: str) -> None:
    if not _any_reading(report, lambda reading: reading.asr.n):
        raise ConfigError(f"{figure} is not drawn: the report holds no run in which it was measured.")


def _any_reading(report: StressReport, known: Callable[[StepReading], int]) -> bool:
    return any(known(reading) for cell in report.cells for reading in cell.readings)
