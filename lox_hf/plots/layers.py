"""Where the change lies that alignment made: a heat map by kind and layer, and how fast singular values fall."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from lox_hf.errors import ConfigError
from lox_hf.plots.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    PURPLE,
    SKY,
    VERMILION,
    finish_with_legend,
    house_style,
    shown,
    whole_steps,
)
from lox_hf.records import LayerEntry, LayerMap, LayerSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NARROW_IN, WIDE_IN, CELL_IN = 6.4, 13.0, 0.24
ROW_IN, PANEL_IN, DECAY_IN = 0.23, 0.75, 2.3
FEW_LAYERS = 12
"""As many have room for a number in every cell."""
DECADES = 4
"""A logarithmic scale shows no more: what lies below has the palest colour."""
MISSING = {"facecolor": "#ededed", "edgecolor": "#c4c4c4", "hatch": "////", "linewidth": 0}
# Seven colours and four dashes have no common divisor: no two of the first 28 kinds look alike.
COLORS = (BLUE, VERMILION, GREEN, PURPLE, SKY, INK, GREY)
DASHES: tuple[Any, ...] = ("solid", (0, (4, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
SEQUENTIAL, DIVERGING = "cividis_r", "RdBu"
"""Both are told apart with any colour vision; the first is one in grey, too."""
MANY_LAYERS = 40
"""Of more not every one has room for its number."""
Cells = Mapping[tuple[str, int | None], LayerSummary]


class Side(NamedTuple):
    """Rows and columns of a heat map: kinds in the layers, or outside them, where the only column is None."""

    kinds: list[str]
    columns: Sequence[int | None]


class Panel(NamedTuple):
    """One heat map.

    Attributes:
        title: What it shows.
        value: What it shows of a cell.
        colors: Name of the colour map: one that runs one way in lightness, or one that has a middle.
        norm: From the values to a scale.
        text: A value as the cell's number.
    """

    title: str
    value: Callable[[LayerSummary], float]
    colors: str
    norm: Callable[[Sequence[float]], Any]
    text: Callable[[float], str]


def draw_layer_map(found: LayerMap) -> "Figure":
    """Draw the map: heat maps of kinds by layers, what is outside the layers beside them, singular values below.

    Args:
        found: The map.

    Returns:
        The figure. A hatched cell has no such matrix, or none that changed.

    Raises:
        ConfigError: If nothing changed, or matplotlib is not installed.
    """
    cells = {key: cell for key, cell in found.cells().items() if not math.isnan(cell.s_1)}
    if not cells:
        raise ConfigError(f"The layers are not drawn: alignment changed none of {len(found.entries)} matrices.")
    panels = [panel for panel in PANELS if any(not math.isnan(panel.value(cell)) for cell in cells.values())]
    sides = _sides(found)
    height = ROW_IN * max(len(side.kinds) for side in sides) + PANEL_IN
    decays = max(len(entry.singular_values) for entry in found.entries) > 1
    heights = [height] * len(panels) + [DECAY_IN] * decays
    width = min(max(CELL_IN * len(sides[0].columns) + 3.4, NARROW_IN), WIDE_IN)
    with house_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, sum(heights)))
        grid = figure.add_gridspec(len(heights), len(sides), height_ratios=heights, width_ratios=_widths(sides))
        for row, panel in enumerate(panels):
            _draw_panel([figure.add_subplot(grid[row, at]) for at in range(len(sides))], panel, cells, sides)
        entries = _draw_decay(figure.add_subplot(grid[-1, :]), found) if decays else {}
        finish_with_legend(figure, list(entries.values()), list(entries))
    return figure


def _sides(found: LayerMap) -> list[Side]:
    """What is in the layers, and what is outside them; a side without kinds is none."""
    keys = found.cells()
    layers = [layer for layer in found.by_layer() if layer is not None]
    sides = []
    for columns in (layers, [None]):
        kinds = [kind for kind in found.by_kind() if any((kind, column) in keys for column in columns)]
        sides += [Side(kinds, columns)] if kinds else []
    return sides


def _widths(sides: Sequence[Side]) -> list[float]:
    """The column outside the layers is wide enough to be seen beside 80 of them."""
    most = max(len(side.columns) for side in sides)
    return [max(float(len(side.columns)), most / 16) for side in sides]


def _draw_panel(grid: Sequence["Axes"], panel: Panel, cells: Cells, sides: Sequence[Side]) -> None:
    """Draw one heat map of layers, and one beside it of what is outside them, in one scale."""
    norm = panel.norm([value for cell in cells.values() if not math.isnan(value := panel.value(cell))])
    numbers = max(len(side.columns) for side in sides) <= FEW_LAYERS
    rows = max(len(side.kinds) for side in sides)
    grid[0].set_title(panel.title)
    images = []
    for axes, side in zip(grid, sides, strict=True):
        found = [[cells.get((kind, column)) for column in side.columns] for kind in side.kinds]
        images.append(_heat(axes, panel, norm, found, numbers))
        _label(axes, side, rows)
    bar = grid[0].figure.colorbar(images[0], ax=list(grid), fraction=0.04, pad=0.02, aspect=12)
    bar.ax.tick_params(labelsize=7)
    if panel.norm is _logarithmic:
        _plain_ticks(bar.ax.yaxis)


def _plain_ticks(axis: Any) -> None:
    """Numbers as they are read, in place of powers that the house style would not set as mathematics."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _heat(axes: "Axes", panel: Panel, norm: Any, grid: list[list[LayerSummary | None]], numbers: bool) -> Any:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    values = [[math.nan if cell is None else panel.value(cell) for cell in row] for row in grid]
    colors = colormaps[panel.colors]
    image = axes.imshow(_clipped(values, norm), aspect="auto", cmap=colors, norm=norm, interpolation="none")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if math.isnan(value):
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **MISSING))
            elif numbers:
                color = _readable_on(colors(float(norm(max(value, norm.vmin)))))
                axes.text(x, y, panel.text(value), ha="center", va="center", fontsize=7, color=color)
    return image


def _label(axes: "Axes", side: Side, rows: int) -> None:
    """Name rows and columns; both sides have the same number of rows, some empty, so that all are equally high."""
    axes.grid(visible=False)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_yticks(range(len(side.kinds)), [shown(kind, 44) for kind in side.kinds])
    axes.tick_params(length=0, labelsize=7)
    axes.spines[:].set_visible(False)
    if side.columns == [None]:
        axes.yaxis.tick_right()
        axes.set_xticks([0], ["outside"])
        return
    marked = range(0, len(side.columns), 1 if len(side.columns) <= MANY_LAYERS else 5)
    axes.set_xticks(list(marked), [str(side.columns[at]) for at in marked])
    axes.set_xlabel("layer", fontsize=8, labelpad=1)


def _draw_decay(axes: "Axes", found: LayerMap) -> dict[str, Any]:
    """Draw s_i / s_1 of every matrix, thin, and the middle one of every kind."""
    handles: dict[str, Any] = {}
    faint = min(0.35, 25 / len(found.entries))
    for number, kind in enumerate(found.by_kind()):
        curves = [_falling(entry) for entry in found.entries if entry.kind == kind and entry.singular_values]
        color, dash = COLORS[number % len(COLORS)], DASHES[number % len(DASHES)]
        for curve in curves if len(curves) > 1 else ():
            axes.plot(range(1, len(curve) + 1), curve, color=color, linewidth=0.4, alpha=faint)
        middle = [median(known) for known in _columns(curves)]
        if middle:
            steps = range(1, len(middle) + 1)
            (handles[kind],) = axes.plot(steps, middle, "o", color=color, linestyle=dash, linewidth=1.6, markersize=3)
    axes.set(xlabel="direction i", ylim=(0, 1.04))
    axes.set_title("s_i / s_1: each matrix thin, the median of its kind thick")
    whole_steps(axes)
    return handles


def _falling(entry: LayerEntry) -> list[float]:
    return [s / entry.singular_values[0] for s in entry.singular_values]


def _columns(curves: Sequence[list[float]]) -> list[list[float]]:
    """The values at every direction; a short curve has none at the last."""
    longest = max(map(len, curves), default=0)
    return [[curve[at] for curve in curves if len(curve) > at] for at in range(longest)]


def _clipped(values: list[list[float]], norm: Any) -> list[list[float]]:
    """Lift what lies below the scale onto its end: a logarithm of 0 is no colour."""
    return [[value if math.isnan(value) else max(value, norm.vmin) for value in row] for row in values]


def _logarithmic(values: Sequence[float]) -> Any:
    from matplotlib.colors import LogNorm

    highest = max(values)
    lowest = max(min((value for value in values if value > 0), default=highest), highest / 10**DECADES)
    return LogNorm(min(lowest, highest / 2), highest)


def _whole(values: Sequence[float]) -> Any:
    from matplotlib.colors import Normalize

    return Normalize(0, 1)


def _around_one(values: Sequence[float]) -> Any:
    from matplotlib.colors import CenteredNorm

    return CenteredNorm(1, max(0.1, *(abs(value - 1) for value in values)))


def _readable_on(rgba: Sequence[float]) -> str:
    """Ink or white, whichever stands out."""
    return INK if 0.299 * rgba[0] + 0.587 * rgba[1] + 0.114 * rgba[2] > 0.55 else "white"


def _significant(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"


def _hundredths(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # no -0.00


PANELS = (
    Panel(
        "Share of the change, of all ||dW||² (%)",
        lambda cell: 100 * cell.change_share,
        SEQUENTIAL,
        _logarithmic,
        _significant,
    ),
    Panel("Held by the directions, of each ||dW||²", lambda cell: cell.energy_share, SEQUENTIAL, _whole, _hundredths),
    Panel("Largest singular value s_1", lambda cell: cell.s_1, SEQUENTIAL, _logarithmic, _significant),
    Panel("Retention: 1 as aligned, 0 erased", lambda cell: cell.retention, DIVERGING, _around_one, _hundredths),
)
