"""What one model leaves on one panel: a curve, two bars, a point. Shares come in [0, 1] and are drawn in percent."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lox_hf.plots.points import Estimate, estimate, estimates_by_step, refused_and_asr
from lox_hf.plots.style import INK, Look
from lox_hf.records import AttackOutcome, CellResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAR = 0.36
Points = Sequence[tuple[float, float]]


def curve_over_steps(axes: "Axes", cells: Sequence[CellResult], look: Look) -> Any:
    """Draw the attack success rate along an attack; of a model that is no control the interval and the seeds too."""
    curve = estimates_by_step(cells, lambda reading: reading.asr)
    if look.prominent:
        low, high = ([100 * value[end] for value in curve.values()] for end in (1, 2))
        axes.fill_between(list(curve), low, high, color=look.color, alpha=0.13, linewidth=0, zorder=1)
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


def bars(axes: "Axes", row: int, cells: Sequence[CellResult], look: Look) -> None:
    """Draw the attack success rate before an attack, hollow, and after its last step, filled, and write both."""
    before, after = (estimate([cell.readings[at].asr for cell in cells]) for at in (0, -1))
    _bar(axes, row - BAR / 2, before, look.color, "none")
    _bar(axes, row + BAR / 2, after, look.color, look.color)
    axes.text(104, row, f"{100 * before.mean:.0f} to {100 * after.mean:.0f} %", va="center", fontsize=8, clip_on=False)


def utility_point(axes: "Axes", outcome: AttackOutcome, look: Look) -> Any:
    """Draw utility kept against the mean attack success rate: the mean large, seeds of what is no control small."""
    values = zip(outcome.utility_kept.values, outcome.mean_asr.values, strict=True)
    for kept, asr in values if look.prominent else ():
        axes.plot(100 * kept, 100 * asr, look.marker, color=look.color, markersize=3, alpha=0.5, zorder=look.order)
    mean = 100 * outcome.utility_kept.mean, 100 * outcome.mean_asr.mean
    return axes.plot(*mean, look.marker, color=look.color, markersize=8, markeredgecolor="white", zorder=look.order)[0]


def _bar(axes: "Axes", y: float, value: Estimate, edge: str, fill: str) -> None:
    axes.barh(y, 100 * value.mean, BAR, linewidth=1.2, edgecolor=edge, facecolor=fill)
    axes.plot([100 * value.low, 100 * value.high], [y, y], color=INK, linewidth=1, marker="|", markersize=4)


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
