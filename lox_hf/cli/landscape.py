"""`lox-hf landscape`: safety over the plane that models span."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lox_hf.cli.cells import about_rows, known, measure_cell, paragraphs, percent
from lox_hf.cli.config_file import merge_file
from lox_hf.cli.measuring import add_measuring_options, make_measurement
from lox_hf.cli.options import add_common_options, add_loading_options, default_output, load_for_running
from lox_hf.cli.words import parse_words
from lox_hf.errors import ConfigError

if TYPE_CHECKING:
    from lox_hf.records import Landscape

DESCRIPTION = """Measure safety over the plane that four models span, or along the line through two, and draw it. In
the paper m1 is the aligned model, m2 its hardened form, and m3 and m4 what the same fine-tuning makes of them. The
first axis is m2 - m1, the second what fine-tuning does to both on average, orthogonal to it. Only m1 is loaded, points
are formed in it from the files of all, and all are asked with m1's tokenizer and chat template. A killed run goes on
where it was."""
REPORT_NAME = "report.md"
GRID = re.compile(r"(\d+)(?:x(\d+))?")
VISAGE = (
    "VISAGE is the mean of 100 - ASR over the points around a model at which some safety is left (Peng et al., "
    "NeurIPS 2024): higher is safer. Their directions are random; these are the directions of the models, so the "
    "figures compare models of one landscape and are none of theirs. Around a model that is unsafe itself it says "
    "nothing of that model."
)
BETWEEN = "Between its points a landscape is interpolated, and off the plane nothing is known."


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "landscape", help="draw safety over the plane that models span", description=DESCRIPTION
    )
    add = parser.add_argument
    add("--models", nargs="+", metavar="MODEL", help="m1 m2, or m1 m2 m3 m4: folders or Hub ids of one shape")
    add("--revisions", nargs="+", metavar="REV", help="their revisions on the Hub, one each")
    add("--grid", metavar="NxM", help="points along the first and the second axis; of two models N (default: 7x7)")
    add(
        "--margin",
        type=float,
        metavar="SHARE",
        help="how far the grid reaches beyond the models, as a share of their extent (default: 0.25)",
    )
    add(
        "--radius",
        type=float,
        metavar="DISTANCE",
        help="reach of the neighbourhood of a model that is summed up (default: half the distance between m1 and m2, "
        "or one step of the grid where that is more)",
    )
    add_common_options(parser, output="folder of the run (default: named after m1)")
    add_measuring_options(parser)
    add_loading_options(parser)
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> None:
    """Measure the landscape, write it with its figure, and print it."""
    options = merge_file(options)
    from lox_hf.analysis.landscape import RUN, check_settings, landscape
    from lox_hf.auto.measures import CandidateMeasures
    from lox_hf.plots.landscape import save_landscape_plot
    from lox_hf.plots.style import check_matplotlib
    from lox_hf.run_folder import RunFolder

    models = parse_words(options.models or [])
    revisions = None if options.revisions is None else parse_words(options.revisions)
    grid, margin = _grid(options.grid or "7x7"), 0.25 if options.margin is None else options.margin
    check_settings(models, grid, margin, options.radius, revisions)
    output = Path(options.output) if options.output else default_output(models[0], "landscape")
    RunFolder(output, RUN).check()  # before a model is loaded, and not only after it
    check_matplotlib()
    measurement = make_measurement(options)
    options.model, options.model_revision = models[0], revisions[0] if revisions else None
    model, tokenizer = load_for_running(options)
    measures = CandidateMeasures(measurement, tokenizer)
    found = landscape(
        model,
        models,
        measures.score,
        grid=grid,
        margin=margin,
        radius=options.radius,
        about=measures.settings(),
        output_dir=output,
        revisions=revisions,
        progressbar=False if options.json else None,
    )
    save_landscape_plot(found, output / "landscape")
    with RunFolder(output, RUN) as folder:
        folder.write(REPORT_NAME, _markdown(found))
    if options.json:
        print(found.to_json(), end="")
        return
    print(_screen(found))
    print(f"\nWritten to {output}: {REPORT_NAME}, landscape.json, .png and .svg, and every point.")


def _grid(word: str) -> tuple[int, int]:
    match = GRID.fullmatch(str(word))
    if match is None:
        raise ConfigError(f"--grid takes numbers of points such as 7x7, of two models one such as 15; got '{word}'.")
    return int(match[1]), int(match[2] or match[1])


def _model_rows(found: "Landscape") -> list[tuple[str, ...]]:
    """The models: where they are, and what was measured of them."""
    second = ("y", "beside") if len(found.ys) > 1 else ()
    rows: list[tuple[str, ...]] = [("", "model", "x", *second, found.measure)]
    for number, model in enumerate(found.models, start=1):
        places = [model.x, model.y, model.beside][: 1 + len(second)]
        own = measure_cell(model.score, found.measure, interval=True)
        rows.append((f"m{number}", model.name, *(f"{place:.3g}" for place in places), own))
    return rows


def _grid_rows(found: "Landscape") -> list[tuple[str, ...]]:
    """The grid as it is drawn: x to the right, y upwards; a line has a row for every point."""
    if len(found.ys) == 1:
        rows = [(f"{point.x:.3g}", measure_cell(point.score, found.measure, interval=True)) for point in found.points]
        return [("x", found.measure), *rows]
    values = {(point.x, point.y): measure_cell(point.score, found.measure) for point in found.points}
    header = (f"{found.measure}, y by x", *(f"{x:.3g}" for x in found.xs))
    return [header, *((f"{y:.3g}", *(values[x, y] for x in found.xs)) for y in reversed(found.ys))]


def _basin_rows(found: "Landscape") -> list[tuple[str, ...]]:
    header = ("around", "within", "points", "VISAGE", "mean fall of safety (points)", "worst")
    rows = [
        (
            f"m{number}",
            f"{basin.radius:.3g}",
            str(basin.n_points),
            *(known(value, ".1f") for value in (basin.visage, basin.mean_fall)),
            percent(basin.worst),
        )
        for number, basin in enumerate(found.basins, start=1)
    ]
    return [header, *rows]


def _screen(found: "Landscape") -> str:
    """The tables and what they say, for a terminal."""
    from lox_hf.evaluation.report import HONESTY, render_text

    tables = [render_text(rows) for rows in (_model_rows(found), _grid_rows(found), _basin_rows(found))]
    return "\n\n".join([*tables, *paragraphs([*found.warnings, VISAGE, BETWEEN, HONESTY])])


def _markdown(found: "Landscape") -> str:
    """The same as a page, with the figure."""
    from lox_hf.evaluation.report import HONESTY, escape, markdown_table

    about: list[tuple[str, ...]] = [("", ""), ("weights that take part", f"{found.parameters:,}")]
    about += about_rows(found.about)
    parts = [
        "# Safety landscape",
        "Origin m1, first axis m2 - m1, second axis ((m3 - m1) + (m4 - m2)) / 2 made orthogonal to it, over all "
        "weights; distances are Frobenius norms. All were asked with m1's tokenizer and chat template.",
        markdown_table(_model_rows(found)),
        "![The landscape](landscape.png)",
        markdown_table(_grid_rows(found)),
        markdown_table(_basin_rows(found)),
        *map(escape, found.warnings),
        VISAGE,
        BETWEEN,
        markdown_table(about),
        HONESTY,
    ]
    return "\n\n".join(parts) + "\n"
