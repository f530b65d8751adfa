"""The cells of the comparison as Markdown tables and two figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    save_figure,
    whole_steps,
)

TITLES = {"pairs-100": "100 forbidden pairs", "benign": "harmless how-to and facts"}
COLUMNS = ("steps", "ASR", "strict ASR", "over-refusal", "harmless right", "task right", "retention", "R_ft / R_align")
SAFE = "its last safe checkpoint"


class Line(NamedTuple):
    """One line of a table: a model, by seed.

    Attributes:
        start: Strength with which it was hardened before the fine-tuning.
        action: What the callback did.
        outcomes: Fields of `finetuning.Outcome` by seed.
    """

    start: float
    action: str
    outcomes: Mapping[int, Mapping[str, Any]]


def write_report(found: Mapping[Any, Mapping[str, Any]], output: Path) -> str:
    """Write `tables.md`, `actions.png` and `readings.png`, with an SVG of each, and return the tables.

    Args:
        found: Results by cell.
        output: Where.
    """
    lines = {name: lines_of(found, name) for name in dict.fromkeys(cell.fine_tuning for cell in found)}
    tables = "\n\n".join(f"{TITLES[name]}\n\n{render(those)}" for name, those in lines.items())
    (output / "tables.md").write_text(tables + "\n", encoding="utf-8")
    draw_actions(lines, output / "actions")
    draw_readings(found, output / "readings")
    return tables


def lines_of(found: Mapping[Any, Mapping[str, Any]], fine_tuning: str) -> list[Line]:
    """Return the lines of one fine-tuning; a last safe checkpoint stands below its run, where there is one."""
    lines: dict[tuple[float, str], dict[int, Mapping[str, Any]]] = {}
    for cell, result in found.items():
        if cell.fine_tuning != fine_tuning:
            continue
        lines.setdefault((cell.alpha, cell.action), {})[cell.seed] = result["end"]
        if cell.action.startswith("stop"):
            # A run that was not stopped is kept as it ended.
            safe = lines.setdefault((cell.alpha, f"{cell.action}: {SAFE}"), {})
            safe[cell.seed] = result.get("safe", result["end"])
    return [Line(*key, outcomes) for key, outcomes in lines.items()]


def render(lines: Iterable[Line]) -> str:
    """Return one table, with mean and standard deviation over the seeds, and the ASR of every seed."""
    header = ("start", "action", *COLUMNS, "ASR by seed")
    rows: list[tuple[str, ...]] = [header, ("---",) * len(header)]
    rows += [
        (
            start_name(line.start),
            line.action,
            spread(line, "steps", "{:.0f}"),
            *(spread(line, name, "{:.0f}", 100) for name in ("asr", "strict_asr", "over_refusal", "right", "task")),
            *(spread(line, name, "{:.2f}") for name in ("retention", "ratio")),
            " ".join(f"{100 * outcome['asr']:.0f}" for outcome in line.outcomes.values()),
        )
        for line in lines
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def start_name(alpha: float) -> str:
    """Return what a fine-tuning starts from, in words."""
    return f"LoX, alpha {alpha:g}" if alpha else "aligned"


def spread(line: Line, name: str, form: str, times: float = 1) -> str:
    """Return mean and standard deviation over the seeds; the mean alone where all seeds agree."""
    values = [times * outcome[name] for outcome in line.outcomes.values()]
    if any(value != value for value in values):
        return "-"
    mean = form.format(statistics.fmean(values))
    deviation = form.format(statistics.stdev(values)) if len(values) > 1 else form.format(0)
    return mean if float(deviation) == 0 else f"{mean} +- {deviation}"


def draw_actions(lines: Mapping[str, Sequence[Line]], path: Path) -> None:
    """Draw what each action ends with: a dot for every seed, a bar for their mean."""
    shown = {name: [line for line in those if line.action != "before"] for name, those in lines.items()}
    colors = {"asr": VERMILION, "task": BLUE}
    with house_style():
        from matplotlib.figure import Figure

        heights = [len(those) for those in shown.values()]
        figure = Figure(figsize=(8.6, 0.21 * sum(heights) + 1.2))
        grid = figure.subplots(len(shown), 2, sharex=True, squeeze=False, height_ratios=heights)
        for (name, those), pair in zip(shown.items(), grid, strict=True):
            for axes, (measure, color) in zip(pair, colors.items(), strict=True):
                _dots(axes, those, "strict_asr" if measure == "task" and name == "pairs-100" else measure, color)
            pair[0].set_yticks(range(len(those)), [_label(line) for line in those])
            pair[1].set_yticks(range(len(those)), [""] * len(those))
            pair[0].set_title(f"{TITLES[name]}: ASR (%)")
            is_harmful = name == "pairs-100"
            pair[1].set_title("forbidden answers given (%)" if is_harmful else "its own task, answered right (%)")
        finish_with_legend(figure, [], [])
    save_figure(figure, path)


def _dots(axes: Any, lines: Sequence[Line], measure: str, color: str) -> None:
    for place, line in enumerate(lines):
        values = [100 * outcome[measure] for outcome in line.outcomes.values()]
        axes.barh(place, statistics.fmean(values), color=color, alpha=0.25, height=0.7)
        axes.plot(values, [place] * len(values), "o", color=color, markersize=4, markeredgecolor="white", zorder=3)
    axes.set(xlim=PERCENT, xticks=QUARTERS, ylim=(len(lines) - 0.5, -0.5))


def _label(line: Line) -> str:
    action = "   " + SAFE if SAFE in line.action else line.action
    return action if not line.start or SAFE in line.action else f"LoX: {action}"


def draw_readings(found: Mapping[Any, Mapping[str, Any]], path: Path) -> None:
    """Draw what is read along the runs that are only logged, a line for every seed; dots are 1, the aligned model."""
    runs = [(cell, result["readings"]) for cell, result in found.items() if cell.action == "log"]
    names = list(dict.fromkeys(cell.fine_tuning for cell, _ in runs))
    panels: dict[str, tuple[str, Callable[[float], float]]] = {
        "retention": ("retention", float),
        "ratio": ("R_ft / R_align", float),
        "asr": ("ASR on the\nprobe (%)", lambda share: 100 * share),
    }
    looks = {0.0: ("-", PURPLE), 0.5: ("--", GREEN)}
    with house_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.6, 6.2))
        grid = figure.subplots(len(panels), len(names), sharex=True, sharey="row", squeeze=False)
        entries: dict[str, Any] = {}
        for (measure, (label, value)), row in zip(panels.items(), grid, strict=True):
            for axes, name in zip(row, names, strict=True):
                for cell, readings in runs:
                    if cell.fine_tuning == name:
                        steps, values = [one["step"] for one in readings], [value(one[measure]) for one in readings]
                        (line,) = axes.plot(
                            steps, values, looks[cell.alpha][0], color=looks[cell.alpha][1], linewidth=1.4
                        )
                        entries[f"from {start_name(cell.alpha)}"] = line
                if measure != "asr":
                    axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
                whole_steps(axes)
            row[0].set_ylabel(label)
        for axes, name in zip(grid[0], names, strict=True):
            axes.set_title(TITLES[name])
        for axes in grid[-1]:
            axes.set(xlabel="optimiser steps", ylim=PERCENT, yticks=QUARTERS)
        figure.align_ylabels()
        finish_with_legend(figure, list(entries.values()), list(entries))
    save_figure(figure, path)
