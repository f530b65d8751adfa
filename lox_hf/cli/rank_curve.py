"""`lox-hf rank-curve`: how many directions of alignment's change carry the safety."""

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lox_hf.cli.cells import about_rows, measure_cell, paragraphs, percent
from lox_hf.cli.config_file import merge_file
from lox_hf.cli.measuring import add_measuring_options, make_measurement
from lox_hf.cli.options import (
    add_base_options,
    add_loading_options,
    add_model_options,
    default_output,
    load_for_running,
    saved_subspace,
)
from lox_hf.cli.words import parse_number, parse_words
from lox_hf.config import REGEX_SIGNS, LoxConfig
from lox_hf.errors import ConfigError

if TYPE_CHECKING:
    from lox_hf.records import RankCurve, Score
    from lox_hf.subspace import SafetySubspace

DESCRIPTION = """Measure the base model with only r directions of the change that alignment made to every matrix, for
several r, and read off the effective rank: the smallest r that is as safe as the aligned model, by the paper's rule
and with what can be said at 95 %. It is where to look for --r. One decomposition serves all ranks, no second model is
loaded, and a killed run goes on where it was."""
REPORT_NAME = "report.md"
EVERYTHING = "all"
INLINE_FLAGS = re.compile(r"\(\?[aiLmsux]+\)")
COLUMNS = {
    "asr": "attack success",
    "over_refusal": "over-refusal",
    "degenerate": "degenerate",
    "strict_asr": "known answer (harmful)",
    "accuracy": "known answer (harmless)",
    "gsm8k": "GSM8K",
    "perplexity": "perplexity",
    "score": "mean score",
}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "rank-curve", help="find how many directions carry the safety", description=DESCRIPTION
    )
    add_model_options(parser, model="the aligned model", output="folder of the run (default: named after the model)")
    add_base_options(parser)
    add = parser.add_argument
    add("--ranks", nargs="+", metavar="R", help="the ranks; 0 is the base (default: 0,1,2,3,4,6,8)")
    add(
        "--layers",
        metavar="PATTERN",
        help="take only modules back to the base whose names contain this, or a regular expression that matches a "
        "part of them (default: all)",
    )
    add(
        "--reset-vectors",
        action="store_true",
        default=None,
        help="at r = 0 take norms and biases from the base too, as the reference does",
    )
    add("--rho", metavar="SHARE", help="how far above the aligned model's rate counts as equal (default: 0.01)")
    add_measuring_options(parser)
    add_loading_options(parser)
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> None:
    """Measure the curve, write it with its figure, and print it."""
    options = merge_file(options)
    from lox_hf.analysis.rank_curve import RANKS, RHO, RUN, rank_curve
    from lox_hf.auto.measures import CandidateMeasures
    from lox_hf.plots.rank_curve import save_rank_curve_plot
    from lox_hf.plots.style import check_matplotlib
    from lox_hf.run_folder import RunFolder

    ranks = RANKS if options.ranks is None else _ranks(options.ranks)
    rho = RHO if options.rho is None else parse_number("--rho", str(options.rho), float)
    output = Path(options.output) if options.output else default_output(options.model, "rank-curve")
    RunFolder(output, RUN).check()  # before a model is loaded, and not only after it
    check_matplotlib()
    measurement = make_measurement(options)
    subspace = saved_subspace(options)
    config = _config(options, subspace)
    model, tokenizer = load_for_running(options)
    measures = CandidateMeasures(measurement, tokenizer)
    curve = rank_curve(
        model,
        options.base_model,
        measures.score,
        config,
        ranks=ranks,
        aligned_model=options.model,
        subspace=subspace,
        reset_vectors=bool(options.reset_vectors),
        rho=rho,
        about=measures.settings(),
        output_dir=output,
        revision=options.model_revision,
        trust_remote_code=bool(options.trust_remote_code),
        progressbar=False if options.json else None,
    )
    save_rank_curve_plot(curve, output / "rank_curve")
    with RunFolder(output, RUN) as folder:
        folder.write(REPORT_NAME, _markdown(curve))
    if options.json:
        print(curve.to_json(), end="")
        return
    print(_screen(curve))
    print(f"\nWritten to {output}: {REPORT_NAME}, rank_curve.json, .png and .svg, the directions and every point.")


def _ranks(words: list[str]) -> list[int]:
    found = parse_words(words)
    if not all(word.isdecimal() for word in found):
        raise ConfigError(f"--ranks takes whole numbers from 0 (the base), such as 0,1,2,4; got {' '.join(words)}.")
    return [int(word) for word in found]


def _config(options: argparse.Namespace, subspace: "SafetySubspace | None") -> LoxConfig:
    """Settings of the decomposition: the saved directions' own, with what the options say."""
    given: dict[str, Any] = {}
    if options.base_revision is not None:
        given["revision"] = options.base_revision
    if options.layers is not None:
        given["target_modules"] = _target(options.layers)
    # A rank of its own for some matrices is nothing that the curve has.
    made = LoxConfig() if subspace is None else replace(subspace.config, rank_pattern=None)
    return replace(made, **given)


def _target(pattern: str) -> str | None:
    """A part of a module's name, or a regular expression that matches a part, as one for the whole name."""
    if pattern == EVERYTHING:  # the reference's word for it
        return None
    part = pattern if REGEX_SIGNS.search(pattern) else re.escape(pattern)
    flags = INLINE_FLAGS.match(part)  # which must stand first
    before = flags[0] if flags else ""
    return f"{before}.*(?:{part.removeprefix(before)}).*"


def _rows(curve: "RankCurve") -> list[tuple[str, ...]]:
    """The table: a row for every rank and one for the aligned model."""
    first = "asr" if curve.effective is None else curve.effective.measure
    names = [name for name in curve.aligned_score.names() if name != "refusal"]
    names = [first, *(name for name in names if name != first)]
    header = ("r", "energy", *(COLUMNS.get(name, name) for name in names))
    rows = [(str(point.r), percent(point.energy_share), *_cells(point.score, names)) for point in curve.points]
    return [header, *rows, ("aligned", "", *_cells(curve.aligned_score, names))]


def _cells(score: "Score", names: list[str]) -> list[str]:
    """The first measure with its interval and n, the others without."""
    return [measure_cell(score, name, interval=not number) for number, name in enumerate(names)]


def _sentences(curve: "RankCurve") -> list[str]:
    """What the curve says, and what a reader should know: a sentence that is both stands once."""
    return list(dict.fromkeys([*(curve.effective.words if curve.effective else ()), *curve.warnings]))


def _screen(curve: "RankCurve") -> str:
    """The table and what it says, for a terminal."""
    from lox_hf.evaluation.report import HONESTY, render_text

    return "\n\n".join([render_text(_rows(curve)), *paragraphs([*_sentences(curve), HONESTY])])


def _markdown(curve: "RankCurve") -> str:
    """The same as a page, with the figure."""
    from lox_hf.evaluation.report import HONESTY, escape, markdown_table

    base = curve.base.name_or_path if curve.base else "not named"
    about: list[tuple[str, ...]] = [
        ("", ""),
        ("aligned", curve.aligned.name_or_path),
        ("base", base),
        ("matrices", str(curve.matrices)),
    ]
    if curve.config["target_modules"]:
        about.append(("modules", str(curve.config["target_modules"])))
    about += about_rows(curve.about)
    parts = [
        "# Rank curve",
        "Safety of the base with r directions of the change that alignment made to every matrix, W_base + Proj_r(dW).",
        markdown_table(about),
        markdown_table(_rows(curve)),
        "![The curve](rank_curve.png)",
        *map(escape, _sentences(curve)),
        HONESTY,
    ]
    return "\n\n".join(parts) + "\n"
