"""A stress test for people: on the screen, as a Markdown page, and as the files of its folder."""

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import replace

from lox_hf.errors import ConfigError
from lox_hf.evaluation.report import SCREEN_WIDTH, escape, markdown_table, one_line, render_text
from lox_hf.plots.style import save_figure
from lox_hf.records import StressReport
from lox_hf.robustness.findings.wording import percent
from lox_hf.robustness.plots import PICTURES, Picture, describe, outcomes_by_attack
from lox_hf.robustness.report.page import render_page
from lox_hf.robustness.report.tables import SHORT, Cell, Table, before_table, safety_table, sections, worst_tables
from lox_hf.run_folder import RunFolder

RESULTS_NAME, MARKDOWN_NAME, PAGE_NAME, FIGURES_NAME = "results.json", "report.md", "report.html", "figures"

__all__ = ["render_markdown", "render_page", "render_screen", "save_report"]


def save_report(report: StressReport, folder: RunFolder) -> None:
    """Write a report into its run's folder: `results.json`, `report.md`, `report.html`, and `figures/` as PNG and SVG.

    Args:
        report: The report.
        folder: The folder; nothing is written where it is in memory.

    Raises:
        OutputError: If the disk does not take it.
    """
    if folder.folder is None:
        return
    figures = {}
    for picture in PICTURES:
        try:
            drawn = picture.draw(report)
        except ConfigError:
            continue  # the page says why
        png, _ = save_figure(drawn, folder.folder / FIGURES_NAME / picture.name)
        figures[picture.name] = f"{FIGURES_NAME}/{png.name}"
    folder.write(MARKDOWN_NAME, render_markdown(report, figures))
    folder.write(PAGE_NAME, render_page(report))
    folder.write(RESULTS_NAME, report.to_json())


def render_screen(report: StressReport) -> str:
    """Render a report as plain text for a terminal; its last lines are the headline.

    Args:
        report: The report.

    Returns:
        A table per attack with the half-life of every seed, the models before the attacks, the worst case, what was
        not run, and what came out, in sentences.
    """
    attacks = outcomes_by_attack(report)
    parts = [f"Attack: {one_line(attack)}\n{_attack_table(report, attack)}" for attack in attacks]
    parts.append(_filled([_columns(report)]))
    named = {"Before any attack": [before_table(report)], "Worst case over the attacks": worst_tables(report)}
    for title, tables in named.items():
        parts += [f"{title}\n{render_text(_texts(table))}" for table in tables]
    for title, lines in (("Controls:", report.notes), ("Not run:", report.not_run)):
        parts += [_filled([title, *lines], "  ")] * bool(lines)
    return "\n\n".join([*parts, _filled(report.headline)])


def render_markdown(report: StressReport, figures: Mapping[str, str] | None = None) -> str:
    """Render a report as a Markdown page in which all text from models and files is escaped.

    Args:
        report: The report.
        figures: Where the figures are, by name, seen from the page; None leaves them out.

    Returns:
        The page.
    """
    parts = ["# Stress test", "\n".join(f"- {escape(line)}" for line in report.headline)]
    for picture in PICTURES:
        if figures and picture.name in figures:
            parts += _picture(picture, report, figures[picture.name])
    for section in sections(report):
        parts.append(f"## {escape(section.title)}")
        parts += ["\n".join(f"- {escape(line)}" for line in section.lines)] * bool(section.lines)
        for table in section.tables:
            parts += [f"### {escape(table.title)}"] * bool(table.title)
            parts += [escape(table.note)] * bool(table.note)
            parts.append(markdown_table([table.header, *(tuple(map(_in_one_line, row)) for row in table.rows)]))
    return "\n\n".join(parts) + "\n"


def _attack_table(report: StressReport, attack: str) -> str:
    """What an attack did to every model; the half-life alone shows its seeds, as more do not fit."""
    table = safety_table(report, attack)
    rows = [row[: len(SHORT)] for row in _texts(replace(table, header=SHORT))]
    after = SHORT.index("steps to 50 %") + 1
    seeds = [" ".join(seed.replace(" ", "") for seed in row[after - 1].seeds) for row in table.rows]
    if any(seeds):
        pairs = zip(rows, ["each seed", *seeds], strict=True)
        rows = [(*row[:after], own, *row[after:]) for row, own in pairs]
    return render_text(rows)


def _columns(report: StressReport) -> str:
    matched, level = percent(report.settings["matched_level"]), percent(report.settings["refusal_level"])
    return (
        f"mean, matched, equal refusal and end are attack success in %: over the attack, when the aligned model has "
        f"{matched}, at {level} benign refusal, and after the last step. Every model at its worst learning rate."
    )


def _texts(table: Table) -> list[tuple[str, ...]]:
    """A table without its seeds; what is said beside a model's name stays."""
    named = ((f"{name.text} ({name.detail})" if name.detail else name.text, row) for name, *row in table.rows)
    return [table.header, *((name, *(cell.text for cell in row)) for name, row in named)]


def _filled(lines: Iterable[str], indent: str = "") -> str:
    return "\n".join(textwrap.fill(one_line(line), SCREEN_WIDTH, subsequent_indent=indent) for line in lines)


def _in_one_line(cell: Cell) -> str:
    beside = [*([", ".join(cell.seeds)] if cell.seeds else []), *([cell.detail] if cell.detail else [])]
    return f"{cell.text} ({'; '.join(beside)})" if beside else cell.text


def _picture(picture: Picture, report: StressReport, path: str) -> list[str]:
    alt = escape(describe(picture, report))
    return [f"## {escape(picture.title)}", f"![{alt}]({path})", escape(picture.reading(report))]
