"""A training run's safety over its steps: how far the weights have moved, and what the model answers."""

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lox_hf.errors import ConfigError
from lox_hf.plots.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    PERCENT,
    PURPLE,
    QUARTERS,
    VERMILION,
    finish_with_legend,
    house_style,
    save_figure,
    whole_steps,
)
from lox_hf.records import TrainingReading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN = 6.4
MANY = 60
"""Above it markers are small, so that they do not hide the line."""
IMAGE_SUFFIXES = (".png", ".svg")
Readings = Sequence[TrainingReading]
Entries = dict[str, Any]
"""What the legend explains, by its words."""


class Panel(NamedTuple):
    """One panel of the figure.

    Attributes:
        label: Label of its y axis.
        figures: It is drawn where one of these was measured, by the names of `TrainingReading.figures`.
        height_in: Its height in inches.
        draw: Draws the readings, and returns what the legend explains.
    """

    label: str
    figures: frozenset[str]
    height_in: float
    draw: Callable[["Axes", Readings], Entries]


def save_drift_plot(readings: Readings, path: Path) -> None:
    """Write the figure of a training run as PNG and SVG.

    Args:
        readings: Readings of the run, by step.
        path: Where, without a suffix; `.png` or `.svg` may stand there. Its folder is made where it is missing.

    Raises:
        ConfigError: If nothing was measured, or matplotlib is not installed.
        OutputError: If the files cannot be written.

    Example:
        >>> from lox_hf.records import DriftReading
        >>> reading = TrainingReading(0, 0.0, "begin", DriftReading(retention=1.0))
        >>> save_drift_plot([reading], Path("outputs/lox/drift"))  # doctest: +SKIP
    """
    stem = path.with_suffix("") if path.suffix in IMAGE_SUFFIXES else path
    save_figure(draw_drift(readings), stem)


def draw_drift(readings: Readings) -> "Figure":
    """Draw a training run: one panel above the other over the same steps, for what was measured and nothing else.

    Args:
        readings: Readings of the run, by step.

    Returns:
        The figure. A point is a reading; where a figure is not known, its line has a gap.

    Raises:
        ConfigError: If nothing was measured, or matplotlib is not installed.
    """
    measured = {name for reading in readings for name in reading.figures()}
    panels = [panel for panel in PANELS if panel.figures & measured]
    if not panels:
        raise ConfigError(f"The drift over training is not drawn: none of {len(readings)} readings holds a figure.")
    heights = [panel.height_in for panel in panels]
    with house_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH_IN, sum(heights) + 0.4))
        grid = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        entries: Entries = {}
        for axes, panel in zip(grid, panels, strict=True):
            entries |= panel.draw(axes, readings)
            entries |= _trips(axes, readings)
            axes.set_ylabel(panel.label)
        whole_steps(axes)
        axes.set_xlabel("optimiser steps")
        figure.align_ylabels()
        finish_with_legend(figure, list(entries.values()), list(entries))
    return figure


def _retention(axes: "Axes", readings: Readings) -> Entries:
    """A correction lifts the line at its step, and the next reading begins from there."""
    steps, values = [], []
    for reading in readings:
        after = [reading.retention_after] if reading.reapplied else []
        values += [reading.drift.retention, *after]
        steps += [reading.step] * (1 + len(after))
    axes.plot(steps, values, color=BLUE, linewidth=1.8)
    _line(axes, readings, [reading.drift.retention for reading in readings], BLUE, "o", linestyle="none")
    _level(axes, 1.0, "aligned")
    _level(axes, 0.0, "erased")
    corrected = [reading for reading in readings if reading.reapplied]
    if not corrected:
        return {}
    found = [(reading.step, reading.retention_after) for reading in corrected]
    (marks,) = axes.plot(*zip(*found, strict=True), "^", color=GREEN, markeredgecolor="white", markersize=8, zorder=4)
    return {"after the correction": marks}


def _correction(axes: "Axes", readings: Readings) -> Entries:
    corrected = [reading for reading in readings if reading.reapplied]
    steps, sizes = [reading.step for reading in corrected], [reading.reapplied for reading in corrected]
    axes.vlines(steps, 0, sizes, color=GREEN, linewidth=1.8)
    axes.plot(steps, sizes, "^", color=GREEN, markersize=6)
    _show(axes, 0.0, max(sizes))
    return {}


def _ratio(axes: "Axes", readings: Readings) -> Entries:
    _line(axes, readings, [reading.drift.ratio for reading in readings], PURPLE, "D")
    _level(axes, 1.0, "aligned")
    _show(axes, 0.0, 1.0)
    return {}


def _answers(axes: "Axes", readings: Readings) -> Entries:
    """Readings at which nothing was asked are no gap: the prompts may be asked at few of them."""
    asked = [(reading, reading.probe) for reading in readings if reading.probe is not None]
    own = [reading for reading, _ in asked]
    steps = [reading.step for reading in own]
    low, high = ([100 * getattr(probe.asr, end) for _, probe in asked] for end in ("low", "high"))
    # The outline shows the interval of a reading that stands alone, too.
    face, edge = (VERMILION, 0.18), (VERMILION, 0.5)
    band = axes.fill_between(steps, low, high, facecolor=face, edgecolor=edge, linewidth=1, zorder=1)
    asr = _line(axes, own, [100 * probe.asr.share for _, probe in asked], VERMILION, "o")
    refused = _line(axes, own, [100 * probe.over_refusal.share for _, probe in asked], GREY, "s", linestyle="--")
    axes.set(ylim=PERCENT, yticks=QUARTERS)
    return {"attack success rate": asr, "95 % interval": band, "harmless prompts refused": refused}


def _perplexity(axes: "Axes", readings: Readings) -> Entries:
    asked = [(reading, reading.probe.refusal_perplexity) for reading in readings if reading.probe is not None]
    _line(axes, [reading for reading, _ in asked], [value for _, value in asked], INK, "v")
    _show(axes, 1.0, 2.0)
    return {}


PANELS = (
    Panel("retention", frozenset({"retention"}), 2.0, _retention),
    Panel("correction\n/ ||S_k||", frozenset({"reapplied"}), 0.9, _correction),
    Panel("R_ft / R_align", frozenset({"ratio"}), 1.5, _ratio),
    Panel("share of prompts (%)", frozenset({"asr", "over_refusal"}), 2.0, _answers),
    Panel("perplexity\nof a refusal", frozenset({"refusal_perplexity"}), 1.3, _perplexity),
)


def _line(
    axes: "Axes", readings: Readings, values: Sequence[float], color: str, marker: str, linestyle: str = "-"
) -> Any:
    """Draw one figure over the steps, with a marker at every reading."""
    size = 4.5 if len(readings) <= MANY else 2.0
    steps = [reading.step for reading in readings]
    (line,) = axes.plot(
        steps, values, color=color, linestyle=linestyle, linewidth=1.8, marker=marker, markersize=size, zorder=3
    )
    return line


def _level(axes: "Axes", value: float, name: str) -> None:
    """Draw a level that a figure is read against, and name it beside the panel."""
    axes.axhline(value, color=INK, linewidth=0.8, linestyle=":", zorder=1)
    place = axes.get_yaxis_transform()
    axes.text(1.01, value, name, transform=place, va="center", fontsize=8)


def _show(axes: "Axes", low: float, high: float) -> None:
    """Show a panel from `low` to `high` at least, and with room above so that a marker there is whole."""
    high = max(high, axes.dataLim.y1)
    axes.set_ylim(low, high + 0.08 * (high - low))


def _trips(axes: "Axes", readings: Readings) -> Entries:
    """Draw a line where the threshold is crossed, and shade how long: on every panel, as any may have the figure."""
    entries: Entries = {}
    for tripped, group in groupby(readings, key=lambda reading: reading.tripped):
        if not tripped:
            continue
        steps = [reading.step for reading in group]
        axes.axvspan(steps[0], steps[-1], color=INK, alpha=0.06, linewidth=0, zorder=0)
        line = axes.axvline(steps[0], color=VERMILION, linewidth=1, linestyle=(0, (2, 2)), alpha=0.7, zorder=0.5)
        entries["beyond the threshold"] = line
    return entries
