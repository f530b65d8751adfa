"""A rank curve: a measure of the base with more and more directions, beside the aligned model's."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lox_hf.errors import ConfigError
from lox_hf.plots.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    PERCENT,
    QUARTERS,
    VERMILION,
    finish_with_legend,
    house_style,
    measure_name,
    save_figure,
    shown,
    swatch,
    whole_steps,
)
from lox_hf.records import EffectiveRank, RankCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE_IN = (6.4, 3.6)
Entries = dict[str, Any]
"""What the legend explains, by its words."""


def save_rank_curve_plot(curve: RankCurve, stem: str | Path, measure: str | None = None) -> tuple[Path, Path]:
    """Write the figure of a rank curve as PNG and SVG.

    Args:
        curve: The curve.
        stem: Where, without a suffix; its folder is made where it is missing.
        measure: What is drawn; see `draw_rank_curve`.

    Returns:
        The two files.

    Raises:
        ConfigError: If the measure was not measured, or matplotlib is not installed.
        OutputError: If the files cannot be written.

    Example:
        >>> curve = RankCurve.from_json(Path("curve/rank_curve.json").read_text())  # doctest: +SKIP
        >>> save_rank_curve_plot(curve, Path("curve/rank_curve"))  # doctest: +SKIP
    """
    return save_figure(draw_rank_curve(curve, measure), stem)


def draw_rank_curve(curve: RankCurve, measure: str | None = None) -> "Figure":
    """Draw a measure against the rank, with 95 % intervals where it is a rate, and the share of energy.

    Args:
        curve: The curve.
        measure: What is drawn; None takes the one of the effective rank, else the first that was measured.

    Returns:
        The figure. The aligned model is a level with its interval as a band; where the effective rank was read from
        this measure, rho's line and both readings of it are marked.

    Raises:
        ConfigError: If the measure was not measured, or matplotlib is not installed.
    """
    measured = curve.aligned_score.names()
    measure = measure or (curve.effective.measure if curve.effective else next(iter(measured), "asr"))
    if all(math.isnan(value) for value in _values(curve, measure)):
        raise ConfigError(
            f"The rank curve is not drawn: '{measure}' was not measured. There is {', '.join(measured) or 'nothing'}."
        )
    effective = curve.effective if curve.effective and curve.effective.measure == measure else None
    with house_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=SIZE_IN)
        axes = figure.add_subplot()
        scale = 100 if measure in curve.aligned_score.rates else 1
        entries = _measure(axes, curve, measure, scale) | _aligned(axes, curve, measure, scale)
        axes.set_xlabel(
            f"r, directions kept of alignment's change to each of {curve.matrices} matrices (0: the base's)"
        )
        axes.set_ylabel(shown(measure_name(measure)) + (" (%)" if scale == 100 else ""))
        if scale == 100:
            axes.set(ylim=PERCENT, yticks=QUARTERS)
        entries |= _energy(axes, curve)
        if effective is not None:
            entries |= _effective(axes, curve, effective)
        whole_steps(axes)
        finish_with_legend(figure, list(entries.values()), list(entries))
    return figure


def _values(curve: RankCurve, measure: str) -> list[float]:
    return [point.score.value(measure) for point in curve.points]


def _ranks(curve: RankCurve) -> list[int]:
    return [point.r for point in curve.points]


def _measure(axes: "Axes", curve: RankCurve, measure: str, scale: float) -> Entries:
    """The curve, and a bar for every interval."""
    ends = [point.score.interval(measure) for point in curve.points]
    values = [scale * value for value in _values(curve, measure)]
    line = axes.plot(_ranks(curve), values, "o-", color=VERMILION, linewidth=1.8, markersize=5, zorder=2)[0]
    # Once more, as the aligned model's level lies on the line where the two are equal.
    axes.plot(_ranks(curve), values, "o", color=VERMILION, markersize=5, zorder=4)
    if any(math.isnan(low) for low, _ in ends):
        return {measure_name(measure): line}
    lows, highs = ([scale * end for end in side] for side in zip(*ends, strict=True))
    bars = axes.vlines(_ranks(curve), lows, highs, color=VERMILION, linewidth=1.2, zorder=3)
    axes.plot([*_ranks(curve)] * 2, [*lows, *highs], "_", color=VERMILION, markersize=7, zorder=3)
    return {measure_name(measure): line, "95 % interval": bars}


def _aligned(axes: "Axes", curve: RankCurve, measure: str, scale: float) -> Entries:
    """The aligned model's level, and its interval as a band."""
    level = axes.axhline(
        scale * curve.aligned_score.value(measure), color=BLUE, linewidth=1.2, linestyle="--", zorder=3
    )
    low, high = (scale * end for end in curve.aligned_score.interval(measure))
    if math.isnan(low):
        return {"aligned model": level}
    axes.axhspan(low, high, facecolor=BLUE, alpha=0.13, linewidth=0, zorder=1)
    return {"aligned model": level, "its 95 % interval": swatch("#dfecf5", "#dfecf5")}


def _energy(axes: "Axes", curve: RankCurve) -> Entries:
    """The share of energy on an axis of its own, which is drawn thinner and behind."""
    beside = axes.twinx()
    axes.set_zorder(beside.get_zorder() + 1)
    axes.patch.set_visible(False)
    shares = [100 * point.energy_share for point in curve.points]
    line = beside.plot(_ranks(curve), shares, "^:", color=GREY, linewidth=0.9, markersize=3.5)[0]
    beside.set_ylabel("energy of the change (%)", color=GREY)
    beside.set(ylim=PERCENT, yticks=QUARTERS)
    beside.tick_params(axis="y", colors=GREY)
    beside.grid(visible=False)
    return {"energy that r directions hold": line}


def _effective(axes: "Axes", curve: RankCurve, found: EffectiveRank) -> Entries:
    """The height below which a rate counts as the aligned model's, and the two ranks that are read from it."""
    bound = 100 * (curve.aligned_score.value(found.measure) + found.rho)
    line = axes.axhline(bound, color=INK, linewidth=0.9, linestyle=":")
    entries: Entries = {f"aligned + rho (rho = {found.rho:g})": line}
    if found.by_rule is not None:
        line = axes.axvline(found.by_rule, color=GREEN, linewidth=1.1, linestyle="-.", zorder=1.5)
        entries[f"effective rank (paper's rule): {found.by_rule}"] = line
    if found.certain is not None:
        place = axes.get_xaxis_transform()
        marks = axes.plot([found.certain], [1.0], "v", color=GREEN, markersize=8, transform=place, clip_on=False)
        entries[f"certain at 95 %: {found.certain}"] = marks[0]
    return entries
