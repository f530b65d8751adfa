"""`lox-hf plot`: a figure again from the record that a command wrote."""

import argparse
from typing import TYPE_CHECKING, Any

from lox_hf.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DESCRIPTION = """Draw a record again as PNG and SVG: rank_curve.json, landscape.json, selection.json, layers.json, the
results.json of a stress test or the readings.jsonl of a training run. Nothing is measured."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser("plot", help="draw a record again from its file", description=DESCRIPTION)
    parser.add_argument("file", metavar="FILE", help="the record")
    parser.add_argument(
        "--output",
        metavar="STEM",
        help="the figure's file without a suffix, of a stress test the folder (default: beside the record, as the "
        "command that made it)",
    )
    parser.add_argument(
        "--measure", metavar="NAME", help="which measure, such as over_refusal (default: the main one)"
    )
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> None:
    """Draw, and say where."""
    from lox_hf.plots.redraw import DRAWABLES, Drawable, redraw

    stress = Drawable("a stress test", frozenset({"outcomes", "cells", "seeds"}), _draw_stress, stem="figures")
    for file in redraw(options.file, options.output, options.measure, [*DRAWABLES, stress]):
        print(file)


def _draw_stress(data: dict[str, Any], _: str | None) -> "dict[str, Figure]":
    """All figures of a stress test but those for which nothing was measured."""
    from lox_hf.records import StressReport
    from lox_hf.robustness.plots import PICTURES

    report, figures, reasons = StressReport.from_dict(data), {}, []
    for picture in PICTURES:
        try:
            figures[picture.name] = picture.draw(report)
        except ConfigError as error:
            reasons.append(str(error))
    if not figures:
        raise ConfigError(" ".join(reasons))
    return figures
