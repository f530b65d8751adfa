"""A selection as a table with its reasons, on the screen and in Markdown, from the same rows."""

import math
import textwrap

from lox_hf.evaluation.report import HONESTY, SCREEN_WIDTH, escape, markdown_table, one_line, render_text
from lox_hf.records import Candidate, Limit, Score, Selection

Rows = list[tuple[str, ...]]
HEADINGS = {
    "asr": "attack success",
    "over_refusal": "over-refusal",
    "degenerate": "degenerate",
    "accuracy": "accuracy",
    "gsm8k": "GSM8K",
    "kl": "KL",
}
UNDER_ATTACK = {"asr_mean": "ASR under attack", "asr": "ASR after attack"}
SHARES = ("asr_mean",)
"""Figures that are shares and no rates."""
RECOMMENDED = "RECOMMENDED"
LEGEND = (
    "Strength is the size of the edit as a share of the change that alignment made. The limits row says how far each "
    "measure may move from the aligned model's. Keeps perhaps: by what was measured, but at 95 % it may break one."
)


def selection_rows(selection: Selection, *, everything: bool = True) -> Rows:
    """Return the table: a header, the limits, the aligned model, and the candidates.

    Args:
        selection: The selection.
        everything: All candidates in the order of the grid, and not only those on the front that keep the limits,
            those that were attacked and the recommended one.

    Returns:
        Rows of cells.
    """
    measures = [limit for limit in selection.limits if not math.isnan(selection.aligned_score.value(limit.measure))]
    names = [limit.measure for limit in measures]
    attacked = selection.aligned_attacked is not None
    header = ["candidate", "strength", *(HEADINGS.get(name, name) for name in names)]
    header += [UNDER_ATTACK.get(selection.objective, f"{selection.objective} after attack")] * attacked + ["limits"]
    allowed = ["limits", "", *(_allowed(limit, selection.aligned_score) for limit in measures)] + [""] * (attacked + 1)
    aligned = ["aligned model", "0.00", *_cells(selection.aligned_score, names)]
    aligned += [_cell(selection.aligned_attacked, selection.objective)] * attacked + [""]
    rows = [tuple(header), tuple(allowed), tuple(aligned)]
    for item in selection.candidates:
        if everything or _is_of_interest(item, selection):
            cells = [item.name, f"{item.strength:.2f}", *_cells(item.score, names)]
            cells += [_cell(item.attacked, selection.objective)] * attacked
            rows.append((*cells, _verdict(item, selection)))
    return rows


def render_selection(selection: Selection) -> str:
    """Return a selection as plain text for a terminal: what is of interest of the table, and the reasons.

    Args:
        selection: The selection.

    Returns:
        The text.
    """
    rows = selection_rows(selection, everything=False)
    left_out = len(selection.candidates) - (len(rows) - 3)
    parts = [render_text(rows)]
    if left_out:
        parts.append(f"{left_out} more candidates break a limit, or others are better in everything: see report.md.")
    said = [LEGEND, *selection.reasons, *(f"Note: {text}" for text in selection.warnings), HONESTY]
    return "\n\n".join([*parts, *(textwrap.fill(one_line(text), SCREEN_WIDTH) for text in said)])


def selection_markdown(selection: Selection, figure: str = "selection.png") -> str:
    """Return a selection as a Markdown page.

    Args:
        selection: The selection.
        figure: The figure's file, as the page names it.

    Returns:
        The text.
    """
    base = selection.base.name_or_path if selection.base else "a model in memory"
    parts = [
        "# Choice of rank, alpha and targets",
        f"Aligned model: {escape(selection.aligned.name_or_path)}, before alignment: {escape(base)}.",
        *(f"- {escape(text)}" for text in selection.reasons),
        *(f"**{escape(text)}**" for text in selection.warnings),
        f"![What every candidate costs and brings]({figure})",
        markdown_table(selection_rows(selection)),
        escape(LEGEND),
        HONESTY,
    ]
    return "\n\n".join(parts) + "\n"


def _is_of_interest(item: Candidate, selection: Selection) -> bool:
    return item.name == selection.recommended or item.attacked is not None or (item.on_front and not item.broken)


def _verdict(item: Candidate, selection: Selection) -> str:
    if item.name == selection.recommended:
        return RECOMMENDED
    if item.broken:
        return "breaks " + ", ".join(text.partition(" ")[0] for text in item.broken)
    return "keeps perhaps" if item.uncertain else "keeps"


def _allowed(limit: Limit, aligned: Score) -> str:
    sign = "+" if limit.higher_is_worse else "-"
    if limit.relative:
        return f"{sign}{100 * limit.most:g} %"
    return f"{sign}{100 * limit.most:g} points" if limit.measure in aligned.rates else f"{sign}{limit.most:g}"


def _cells(score: Score, names: list[str]) -> list[str]:
    return [_cell(score, name) for name in names]


def _cell(score: Score | None, name: str) -> str:
    value = math.nan if score is None else score.value(name)
    if score is None or math.isnan(value):
        return "-"
    return f"{100 * value:.1f} %" if name in score.rates or name in SHARES else f"{value:.3g}"
