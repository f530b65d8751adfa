"""A landscape: a measure over the plane of models as contours, or along the line through two of them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lox_hf.errors import ConfigError
from lox_hf.plots.style import (
    BLUE,
    GREEN,
    INK,
    PERCENT,
    PURPLE,
    QUARTERS,
    VERMILION,
    finish_with_legend,
    house_style,
    measure_name,
    save_figure,
    shown,
)
from lox_hf.records import GridPoint, Landscape, PlacedModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN, PANEL_IN, LINE_HEIGHT_IN = 6.4, 4.6, 3.6
COLOURS = "cividis"
"""Its lightness rises evenly, and it looks the same with any colour vision."""
DARK = 0.55
"""Share of the range below which the map is so dark that lines on it are white."""
MARKERS, MODEL_COLOURS = "osD^", (BLUE, VERMILION, GREEN, PURPLE)
SQUARE = 2.5
"""Up to this ratio of the sides both axes have one scale."""
AXES = ("distance from m1 along m2 - m1", "distance along fine-tuning,\northogonal to it")
UNIT = "(Frobenius norm over all weights)"
Entries = dict[str, Any]
"""What the legend explains, by its words."""


def save_landscape_plot(found: Landscape, stem: str | Path, measure: str | None = None) -> tuple[Path, Path]:
    """Write the figure of a landscape as PNG and SVG.

    Args:
        found: The landscape.
        stem: Where, without a suffix; its folder is made where it is missing.
        measure: What is drawn; see `draw_landscape`.

    Returns:
        The two files.

    Raises:
        ConfigError: If the measure was not measured, or matplotlib is not installed.
        OutputError: If the files cannot be written.

    Example:
        >>> found = Landscape.from_json(Path("landscape/landscape.json").read_text())  # doctest: +SKIP
        >>> save_landscape_plot(found, Path("landscape/landscape"))  # doctest: +SKIP
    """
    return save_figure(draw_landscape(found, measure), stem)


def draw_landscape(found: Landscape, measure: str | None = None) -> "Figure":
    """Draw a measure over the plane of four models, or along the line through two.

    Args:
        found: The landscape.
        measure: What is drawn; None takes the landscape's own.

    Returns:
        The figure. Dots are the points that were measured, colours between them are interpolated; a line has 95 %
        intervals. A model that lies beside the plane is marked hollow, at its projection.

    Raises:
        ConfigError: If the measure was not measured, or matplotlib is not installed.
    """
    measure = measure or found.measure
    if all(math.isnan(point.score.value(measure)) for point in found.points):
        measured = found.points[0].score.names() if found.points else []
        raise ConfigError(
            f"The landscape is not drawn: '{measure}' was not measured. There is {', '.join(measured) or 'nothing'}."
        )
    is_rate = any(measure in point.score.rates for point in found.points)
    label = shown(measure_name(measure)) + (" (%)" if is_rate else "")
    with house_style():
        from matplotlib.figure import Figure

        figure = Figure()
        axes = figure.add_subplot()
        draw = _plane if len(found.ys) > 1 else _line
        entries = draw(figure, axes, found, measure, is_rate, label)
        finish_with_legend(figure, list(entries.values()), list(entries))
    return figure


def _plane(figure: "Figure", axes: "Axes", found: Landscape, measure: str, is_rate: bool, label: str) -> Entries:
    """Contours, the points that they come from, and the models."""
    import numpy as np

    flat = _values(found.points, measure, is_rate)
    values = np.ma.masked_invalid(np.array(flat).reshape(len(found.xs), len(found.ys)).T)
    levels = _levels(float(values.min()), float(values.max()), is_rate)
    filled = axes.contourf(found.xs, found.ys, values, levels=levels, cmap=COLOURS)
    _contour_lines(axes, found, values, levels)
    axes.plot(
        [point.x for point in found.points],
        [point.y for point in found.points],
        ".",
        color="white",
        markeredgecolor=INK,
        markeredgewidth=0.4,
        markersize=4,
        zorder=3,
        clip_on=False,
    )
    bar = figure.colorbar(filled, cax=axes.inset_axes((1.03, 0, 0.04, 1)))  # as high as the panel, whatever its shape
    bar.set_label(label)
    if is_rate:
        bar.set_ticks(range(0, 101, 20))
    width, height = found.xs[-1] - found.xs[0], found.ys[-1] - found.ys[0]
    if 1 / SQUARE <= width / height <= SQUARE:
        axes.set_aspect("equal")
    figure.set_size_inches(WIDTH_IN, 0.6 + min(max(PANEL_IN * height / width, 2.2), 6.0))
    axes.grid(visible=False)
    axes.set_xlabel(f"{AXES[0]} {UNIT}")
    axes.set_ylabel(AXES[1])
    return _models_on_plane(axes, found, measure, is_rate)


def _line(figure: "Figure", axes: "Axes", found: Landscape, measure: str, is_rate: bool, label: str) -> Entries:
    """The measure along the line with its intervals, and the models where they lie."""
    figure.set_size_inches(WIDTH_IN, LINE_HEIGHT_IN)
    entries: Entries = {}
    if is_rate:
        ends = [point.score.interval(measure) for point in found.points]
        lows, highs = ([100 * end for end in side] for side in zip(*ends, strict=True))
        entries["95 % interval"] = axes.fill_between(found.xs, lows, highs, color=INK, alpha=0.13, linewidth=0)
        axes.set(ylim=PERCENT, yticks=QUARTERS)
    values = _values(found.points, measure, is_rate)
    axes.plot(found.xs, values, ".-", color=INK, linewidth=1.6, markersize=6, zorder=3)
    own = _values(found.models, measure, is_rate)
    for number, (model, value) in enumerate(zip(found.models, own, strict=True)):
        axes.axvline(model.x, color=MODEL_COLOURS[number], linewidth=1, linestyle="--", zorder=1)
        (mark,) = axes.plot(model.x, value, **_look(number, model), zorder=4)
        axes.text(
            model.x, 1.02, f"m{number + 1}", ha="center", weight="bold", transform=axes.get_xaxis_transform()
        )  # above the panel, where no line runs through it
        entries[_words(number, found.models, value, is_rate)] = mark
    axes.set_xlabel(f"{AXES[0]} {UNIT}")
    axes.set_ylabel(label)
    return entries


def _contour_lines(axes: "Axes", found: Landscape, values: Any, levels: Sequence[float]) -> None:
    """Lines with their numbers on them, so that the figure reads in grey: white where the map is dark."""
    inner = [level for level in levels if values.min() < level < values.max()]
    if not inner:
        return  # flat: there is no line to draw
    span = levels[-1] - levels[0]
    inks = ["white" if level - levels[0] < DARK * span else INK for level in inner]
    lines = axes.contour(found.xs, found.ys, values, levels=inner, colors=inks, linewidths=0.7)
    axes.clabel(lines, levels=[level for level in inner if level in levels[::2]], fmt="%g", fontsize=7)


def _models_on_plane(axes: "Axes", found: Landscape, measure: str, is_rate: bool) -> Entries:
    """Each model with a marker of its own, and its short name on the side that is away from the others."""
    from matplotlib.patheffects import withStroke

    middle = [math.fsum(getattr(model, axis) for model in found.models) / len(found.models) for axis in "xy"]
    entries: Entries = {}
    own = _values(found.models, measure, is_rate)
    for number, (model, value) in enumerate(zip(found.models, own, strict=True)):
        (mark,) = axes.plot(model.x, model.y, **_look(number, model), zorder=5, clip_on=False)
        right, above = model.x >= middle[0], model.y >= middle[1]
        name = axes.annotate(
            f"m{number + 1}",
            (model.x, model.y),
            (8 if right else -8, 8 if above else -8),
            textcoords="offset points",
            ha="left" if right else "right",
            va="bottom" if above else "top",
            weight="bold",
            zorder=6,
        )
        name.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        entries[_words(number, found.models, value, is_rate)] = mark
    return entries


def _look(number: int, model: PlacedModel) -> dict[str, Any]:
    """A model's marker: with a white rim, and hollow where it is only a projection."""
    colour = MODEL_COLOURS[number]
    if model.is_beside:
        own = {"markersize": 9, "markerfacecolor": "white", "markeredgecolor": colour, "markeredgewidth": 2.2}
    else:
        own = {"markersize": 10, "markerfacecolor": colour, "markeredgecolor": "white", "markeredgewidth": 1.2}
    return {"linestyle": "none", "marker": MARKERS[number], **own}


def _words(number: int, models: Sequence[PlacedModel], value: float, is_rate: bool) -> str:
    """What the legend says of a model: its name, what was measured of it itself, and where it is not in the plane."""
    model = models[number]
    own = "not known" if math.isnan(value) else f"{value:.0f} %" if is_rate else f"{value:.3g}"
    beside = f" (projected: {model.beside:.2g} beside)" if model.is_beside else ""
    return f"m{number + 1}: {_short(model.name, [other.name for other in models])}, itself {own}{beside}"


def _short(name: str, names: Sequence[str]) -> str:
    """The last parts of a path, two or as many as tell it from the others; a Hub id has no more."""
    parts = [Path(other).parts for other in names]
    for count in range(2, max(map(len, parts)) + 1):
        if sum(other[-count:] == Path(name).parts[-count:] for other in parts) == 1:
            return "/".join(Path(name).parts[-count:])
    return name


def _values(places: Sequence[GridPoint | PlacedModel], measure: str, is_rate: bool) -> list[float]:
    return [(100 if is_rate else 1) * place.score.value(measure) for place in places]


def _levels(low: float, high: float, is_rate: bool) -> list[float]:
    """Borders of the colours: tens of a percentage, else about ten round numbers around what there is."""
    if is_rate:
        return [float(level) for level in range(0, 101, 10)]
    from matplotlib.ticker import MaxNLocator

    return [float(level) for level in MaxNLocator(10).tick_values(low, high if high > low else low + 1)]
