"""What one model leaves on one panel: a curve, two bars, a point. Shares come in [0, 1] and are drawn in percent."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lox_hf.plots.style import INK
from lox_hf.records import AttackOutcome, CellResult
from lox_hf.robustness.findings.curves import mean_asr
from lox_hf.robustness.findings.seeds import spread
from lox_hf.robustness.findings.wording import percent
from lox_hf.robustness.plots.looks import Look
from lox_hf.robustness.plots.points import estimate, estimates_by_step, refused_and_asr

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAR = 0.36
Points = Sequence[tuple[float, float]]


def curve_over_steps(axes: "Axes", cells: Sequence[CellResult], look: Look, band: bool) -> Any:
    """Draw the attack success rate along an attack; but for controls each seed too, and maybe the interval."""
    curve = estimates_by_step(cells, lambda reading: reading.asr)
    if look.prominent and band:
        low, high = ([100 * value[end] for value in curve.values()] for end in (1, 2))
        axes.fill_between(list(curve), low, high, color=look.color, alpha=0.13, linewidth=0, zorder=1)
    if look.prominent:
        _seeds(axes, ([(r.step, 100 * r.asr.share) for r in cell.readings] for cell in cells), look)
    return _line(axes, [(step, 100 * value.mean) for step, value in curve.items()], look)


def curve_over_refusal(axes: "Axes", cells: Sequence[CellResult], look: Look) -> Any:
    """Draw the attack success rate against over-refusal along an attack, a ring where it begins."""
    asr = estimates_by_step(cells, lambda reading: reading.asr)
    refused = estimates_by_step(cells, lambda reading: reading.over_refusal)
    points = [(100 * refused[step].mean, 100 * asr[step].mean) for step in asr if step in refused]
    if look.prominent:
        _seeds(axes, map(refused_and_asr, cells), look)
    for x, y in points[:1]:
        axes.plot(x, y, "o", markersize=9, markerfacecolor="none", markeredgecolor=look.color, zorder=look.order)
    return _line(axes, points, look)


def bars(axes: "Axes", row: int, cells: Sequence[CellResult], look: Look, band: bool) -> None:
    """Draw the attack success rate before an attack, hollow, and after its last step, filled, and write both."""
    ends = [[cell.readings[at].asr for cell in cells] for at in (0, -1)]
    for y, rates, fill in zip((row - BAR / 2, row + BAR / 2), ends, ("none", look.color), strict=True):
        mean, low, high = (100 * value for value in estimate(rates))
        axes.barh(y, mean, BAR, linewidth=1.2, edgecolor=look.color, facecolor=fill)
        marked = [low, high] if band else [100 * rate.share for rate in rates]
        axes.plot(marked, [y] * len(marked), "|-" if band else "|", color=INK, linewidth=1, markersize=4)
    before, after = (percent(estimate(rates).mean).removesuffix(" %") for rates in ends)
    axes.text(104, row, f"{before} to {after} %" if cells else "not counted", va="center", fontsize=8, clip_on=False)


def utility_point(axes: "Axes", outcome: AttackOutcome, runs: Sequence[CellResult], look: Look) -> Any:
    """Draw utility kept against the mean attack success rate: the mean large, seeds of what is no control small."""
    # Seeds that collapsed too: this figure is the one that shows them.
    known = [share for share in outcome.utility_kept.values if not math.isnan(share)]
    asr = [mean_asr(run.readings) for run in sorted(runs, key=lambda run: run.seed)]
    for kept, rate in zip(known, asr, strict=False) if look.prominent else ():
        axes.plot(100 * kept, 100 * rate, look.marker, color=look.color, markersize=3, alpha=0.5, zorder=look.order)
    mean = 100 * outcome.utility_kept.mean, 100 * spread(asr).mean
    return axes.plot(*mean, look.marker, color=look.color, markersize=8, markeredgecolor="white", zorder=look.order)[0]


def _line(axes: "Axes", points: Points, look: Look) -> Any:
    xs, ys = zip(*points, strict=True) if points else ((), ())
    (line,) = axes.plot(
        xs,
        ys,
        color=look.color,
        linestyle=look.dash,
        linewidth=look.width,
        marker=look.marker,
        markersize=4.5,
        # With many readings a marker on each would hide the line.
        markevery=max(1, len(xs) // 8),
        zorder=look.order,
    )
    return line


def _seeds(axes: "Axes", curves: Iterable[Points], look: Look) -> None:
    for points in curves:
        xs, ys = zip(*points, strict=True) if points else ((), ())
        axes.plot(xs, ys, color=look.color, linewidth=0.7, alpha=0.4, zorder=1.5)
