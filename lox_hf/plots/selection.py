"""A selection: what every hardening costs, and what it brings against a short attack."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    measure_name,
    save_figure,
    shown,
)
from lox_hf.records import Candidate, Limit, Score, Selection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_IN = (3.9, 3.4)
COST_PANELS = 2
NEAR = 0.2
"""A limit of which no more than this is used lies out of sight: beside it nothing could be told apart."""
FINE = "kl"
"""A cost that tells candidates apart also where all of them answer alike."""
SHARES = ("asr_mean",)
"""Figures that are shares and no rates."""
COLORS = (BLUE, GREEN, PURPLE, SKY, INK)
MARKERS = "osD^vPX"
Entries = dict[str, Any]
"""What the legend explains, by its words."""


def save_selection_plot(selection: Selection, stem: str | Path) -> tuple[Path, Path]:
    """Write the figure of a selection as PNG and SVG.

    Args:
        selection: The selection.
        stem: Where, without a suffix; its folder is made where it is missing.

    Returns:
        The two files.

    Raises:
        ConfigError: If nothing was measured that has a limit, or matplotlib is not installed.
        OutputError: If the files cannot be written.

    Example:
        >>> selection = Selection.from_json(Path("select/selection.json").read_text())  # doctest: +SKIP
        >>> save_selection_plot(selection, Path("select/selection"))  # doctest: +SKIP
    """
    return save_figure(draw_selection(selection), stem)


def draw_selection(selection: Selection) -> "Figure":
    """Draw what hardenings cost against their size, and what they bring where they were attacked.

    The two measures that most candidates pay with have a panel each, with the limit as a line. Where candidates were
    attacked, a last panel sets the objective against the KL divergence, or where that is not known the first of them,
    with alpha beside every point. Colours are targets and markers ranks; candidates of one kind are joined by growing
    alpha; those that break a limit are hollow.

    Args:
        selection: The selection.

    Returns:
        The figure. Rates have their 95 % intervals.

    Raises:
        ConfigError: If nothing was measured that has a limit, or matplotlib is not installed.
    """
    known = _dearest(selection)
    costs = known[:COST_PANELS]
    if not costs:
        raise ConfigError("The selection is not drawn: of the aligned model nothing was measured that has a limit.")
    attacked = [item for item in selection.candidates if item.attacked is not None]
    count = len(costs) + bool(attacked)
    with house_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(PANEL_IN[0] * count, PANEL_IN[1]))
        panels = list(figure.subplots(1, count, squeeze=False)[0])
        entries: Entries = {}
        for axes, limit in zip(panels, costs, strict=False):
            entries |= _cost_panel(axes, selection, limit)
        if attacked:
            price = next((limit for limit in known if limit.measure == FINE), costs[0])
            entries |= _gain_panel(panels[-1], selection, price, attacked)
        entries = {**_looks_explained(selection), **entries}
        finish_with_legend(figure, list(entries.values()), list(entries))
    return figure


def _dearest(selection: Selection) -> list[Limit]:
    """The limits that can be told, by how many candidates exceed them, and then by how near one comes."""
    aligned = selection.aligned_score
    known = [limit for limit in selection.limits if not math.isnan(aligned.value(limit.measure))]

    def order(limit: Limit) -> tuple[int, float]:
        used = [_used(limit, aligned, item.score) for item in selection.candidates]
        return sum(share > 1 + 1e-9 for share in used), max((x for x in used if not math.isnan(x)), default=0.0)

    return sorted(known, key=order, reverse=True)


def _used(limit: Limit, aligned: Score, score: Score) -> float:
    """How much of what a limit allows has been used."""
    moved, room = (
        value - aligned.value(limit.measure) for value in (score.value(limit.measure), _level(limit, aligned))
    )
    return moved / room if room else math.inf * moved if moved else 0.0


def _cost_panel(axes: "Axes", selection: Selection, limit: Limit) -> Entries:
    """One measure against the size of the edit."""
    name, aligned = limit.measure, selection.aligned_score
    entries = {"limit": _limit_line(axes.axhline, axes.axhspan, limit, aligned)}
    for group in _by_kind(selection.candidates):
        xs = [item.strength for item in group]
        ys = [_scaled(item.score, name) for item in group]
        axes.plot(xs, ys, color=_color(selection, group[0]), linewidth=0.9, alpha=0.45, zorder=2)
        for item, x, y in zip(group, xs, ys, strict=True):
            _interval(axes, x, item.score, name, _color(selection, item))
            _point(axes, selection, item, x, y)
    sign = 1 if limit.higher_is_worse else -1
    pairs = [(-item.strength, sign * _scaled(item.score, name)) for item in selection.candidates]
    entries |= _front(axes, [(-x, sign * y) for x, y in _lower_hull([(0.0, sign * _scaled(aligned, name)), *pairs])])
    entries |= _aligned(axes, 0.0, _scaled(aligned, name))
    entries |= _recommended(axes, selection, lambda item: (item.strength, _scaled(item.score, name)))
    _axis(axes, "y", name, [item.score for item in selection.candidates], aligned, limit)
    axes.set_xlabel("size of the edit / size of alignment's change")
    axes.set_title("What it costs")
    return entries


def _gain_panel(axes: "Axes", selection: Selection, limit: Limit, attacked: Sequence[Candidate]) -> Entries:
    """The objective after the attack against a cost before it."""
    cost, objective = limit.measure, selection.objective
    entries = {"limit": _limit_line(axes.axvline, axes.axvspan, limit, selection.aligned_score)}

    def place(item: Candidate) -> tuple[float, float]:
        return _scaled(item.score, cost), math.nan if item.attacked is None else _scaled(item.attacked, objective)

    for item in attacked:
        x, y = place(item)
        _interval(axes, x, item.attacked or item.score, objective, _color(selection, item))
        _point(axes, selection, item, x, y)
        axes.annotate(f"{item.config['alpha']:g}", (x, y), (4, 4), textcoords="offset points", fontsize=7, color=INK)
    sign = 1 if limit.higher_is_worse else -1
    points = [place(item) for item in attacked]
    if selection.aligned_attacked is not None:
        ours = _scaled(selection.aligned_score, cost), _scaled(selection.aligned_attacked, objective)
        axes.axhline(ours[1], color=VERMILION, linewidth=0.8, linestyle=":", zorder=1)
        entries |= _aligned(axes, *ours)
        points.append(ours)
    entries |= _front(axes, [(sign * x, y) for x, y in _lower_hull([(sign * x, y) for x, y in points])])
    entries |= _recommended(axes, selection, place)
    _axis(axes, "x", cost, [item.score for item in attacked], selection.aligned_score, limit)
    reached = [item.attacked for item in attacked if item.attacked is not None]
    _axis(axes, "y", objective, reached, selection.aligned_attacked or reached[0])
    axes.set_title("What it brings (numbers: alpha)")
    return entries


def _by_kind(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Candidates that differ in alpha only, by growing alpha."""
    groups: dict[Any, list[Candidate]] = {}
    for item in sorted(candidates, key=lambda item: item.strength):
        groups.setdefault((item.targets, str(item.config["r"])), []).append(item)
    return list(groups.values())


def _lower_hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both, by x; lower is better."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(point for point in points if not any(map(math.isnan, point))):
        if not found or y < found[-1][1]:
            found.append((x, y))
    return found


def _front(axes: "Axes", points: Sequence[tuple[float, float]]) -> Entries:
    xs, ys = zip(*points, strict=True) if points else ((), ())
    (line,) = axes.plot(xs, ys, color=GREY, linewidth=5, alpha=0.25, solid_capstyle="round", zorder=1)
    return {"front: nothing is better in both": line}


def _point(axes: "Axes", selection: Selection, item: Candidate, x: float, y: float) -> None:
    color = _color(selection, item)
    face = "white" if item.broken else color
    marker = _marker(selection, item)
    axes.plot(x, y, marker, color=color, markerfacecolor=face, markersize=5, markeredgewidth=1.1, zorder=3)


def _interval(axes: "Axes", x: float, score: Score, name: str, color: str) -> None:
    low, high = score.interval(name)
    axes.plot([x, x], [100 * low, 100 * high], color=color, linewidth=0.8, alpha=0.3, zorder=1.5)


def _aligned(axes: "Axes", x: float, y: float) -> Entries:
    (mark,) = axes.plot(x, y, "*", color=VERMILION, markersize=11, markeredgecolor="white", zorder=5)
    return {"aligned model": mark}


def _recommended(axes: "Axes", selection: Selection, place: Any) -> Entries:
    if selection.recommended is None:
        return {}
    x, y = place(selection.get(selection.recommended))
    (ring,) = axes.plot(
        x, y, "o", markersize=13, markerfacecolor="none", markeredgecolor=VERMILION, markeredgewidth=1.8, zorder=6
    )
    return {f"recommended: {selection.recommended}": ring}


def _limit_line(line: Any, span: Any, limit: Limit, aligned: Score) -> Any:
    """The limit, and a shade over what lies beyond."""
    level = _level(limit, aligned) * _scale(aligned, limit.measure)
    far = 1e6 if limit.higher_is_worse else -1e6
    span(level, far, color=INK, alpha=0.05, linewidth=0, zorder=0)
    return line(level, color=INK, linewidth=1, linestyle=(0, (4, 2)), zorder=1)


def _level(limit: Limit, aligned: Score) -> float:
    value = aligned.value(limit.measure)
    most = limit.most * abs(value) if limit.relative else limit.most
    return value + most if limit.higher_is_worse else value - most


def _axis(
    axes: "Axes", which: str, name: str, scores: Sequence[Score], aligned: Score, limit: Limit | None = None
) -> None:
    """Label an axis and keep it to what was measured; a figure that grows fast is drawn on a logarithmic scale."""
    scale = _scale(aligned, name)
    values = [end * scale for score in scores for end in (score.value(name), *score.interval(name))]
    near = limit is not None and any(_used(limit, aligned, score) > NEAR for score in scores)
    levels = [_level(limit, aligned) * scale] if limit is not None and near else []
    known = [value for value in [*values, *levels, aligned.value(name) * scale] if math.isfinite(value)]
    low, high = min(known), max(known)
    unit = " (%)" if scale == 100 else ""
    setting = getattr(axes, f"set_{which}lim")
    if not unit and limit is not None and 0 <= low and 0 < 30 * limit.most < high:
        getattr(axes, f"set_{which}scale")("symlog", linthresh=limit.most, linscale=0.5)
        setting(-0.15 * limit.most, 1.5 * high)
    else:
        room = 0.06 * (high - low or 1.0)
        setting(low - room, high + room)
    getattr(axes, f"set_{which}label")(shown(measure_name(name), 46) + unit)


def _scale(score: Score, name: str) -> float:
    return 100.0 if name in score.rates or name in SHARES else 1.0


def _scaled(score: Score, name: str) -> float:
    return _scale(score, name) * score.value(name)


def _color(selection: Selection, item: Candidate) -> str:
    targets = list(dict.fromkeys(other.targets for other in selection.candidates))
    return COLORS[targets.index(item.targets) % len(COLORS)]


def _marker(selection: Selection, item: Candidate) -> str:
    ranks = list(dict.fromkeys(str(other.config["r"]) for other in selection.candidates))
    return MARKERS[ranks.index(str(item.config["r"])) % len(MARKERS)]


def _looks_explained(selection: Selection) -> Entries:
    """Legend entries for targets, ranks and hollow markers."""
    from matplotlib.lines import Line2D

    entries: Entries = {}
    for item in selection.candidates:
        entries.setdefault(item.targets, Line2D([], [], color=_color(selection, item), linewidth=2.5))
    for item in selection.candidates:
        r = item.config["r"]
        mark = Line2D([], [], color=GREY, marker=_marker(selection, item), linestyle="none", markersize=6)
        entries.setdefault("full rank" if r is None else f"r = {r}", mark)
    if any(item.broken for item in selection.candidates):
        hollow = Line2D([], [], color=GREY, marker="o", linestyle="none", markersize=6, markerfacecolor="white")
        entries["breaks a limit (hollow)"] = hollow
    return entries
