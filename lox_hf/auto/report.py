"""The report of a whole run: a few lines for the screen, a page, and the files."""

import math
import textwrap
from collections.abc import Sequence

from lox_hf.analysis.limits import is_judged
from lox_hf.analysis.select import RECORD_NAME
from lox_hf.auto.selection_report import LEGEND, selection_rows
from lox_hf.config import CONFIG_NAME
from lox_hf.evaluation.report import HONESTY, SCREEN_WIDTH, Rows, escape, markdown_table, one_line, render_text
from lox_hf.records import AutoReport, Limit, PairedDifference, Score, Selection
from lox_hf.run_folder import RunFolder

REPORT_NAME, PAGE_NAME = "report.json", "report.md"
HARDENED, SELECTION, FIGURE = "hardened", "selection", "selection"
WORDS = {
    "asr": "attack success",
    "over_refusal": "over-refusal",
    "degenerate": "degenerate",
    "accuracy": "known answers",
    "gsm8k": "GSM8K",
    "perplexity": "perplexity",
    "kl": "KL divergence from the aligned model",
    "asr_mean": "mean attack success along the attack",
    "steps_to_half": "steps until half the refusals are lost",
}
SHARES = ("asr_mean",)
FIGURES = ("kl", "perplexity", "score")
"""Measures that are no rates."""
NOT_CHOSEN_BY = (
    "Measured on prompts that nothing was chosen by: a choice looks better on what it was chosen by than it is."
)
ONE_ATTACK = (
    "This is one attack with one seed at one learning rate. LoX delays the loss of safety and does not prevent it, "
    "and a gain that plain controls have too is none of LoX: lox-hf stress shows both."
)


def in_words(score: Score) -> str:
    """Return a score as a line.

    Args:
        score: The score.

    Returns:
        Its rates and figures; intervals for the attack success rate alone, so that it can be read.

    Example:
        >>> from lox_hf.statistics import rate
        >>> in_words(Score({"asr": rate(1, 100), "over_refusal": rate(3, 50)}, {"kl": 0.0123}))
        'attack success 1.0 % [0.2, 5.4] of 100, over-refusal 6.0 %, KL divergence from the aligned model 0.0123'
    """
    names = [name for name in WORDS if name in score.names()]
    return ", ".join(f"{WORDS[name]} {score.rates[name] if name == 'asr' else _value(score, name)}" for name in names)


def outcome_rows(report: AutoReport) -> Rows:
    """Return both models before and after the attack, with a header; empty where nothing is hardened."""
    if report.before is None or report.after is None:
        return []
    rows: Rows = [("", "aligned", "hardened", "difference", "95 % interval", "p (McNemar)", "pairs")]
    rows += _rows(report.before.score, report.after.score, report.differences)
    if report.before.attacked is not None and report.after.attacked is not None:
        attacked = _rows(report.before.attacked, report.after.attacked, report.attacked_differences)
        rows += [(f"attacked: {name}", *cells) for name, *cells in attacked]
    return rows


def render_screen(report: AutoReport) -> str:
    """Return what a terminal shows at the end of a run.

    Args:
        report: The report.

    Returns:
        The outcome, without what was told on the way.
    """
    if report.stopped:
        return textwrap.fill(f"Stopped: {one_line(report.stopped)} Nothing was hardened.", SCREEN_WIDTH)
    notes = [NOT_CHOSEN_BY, *[ONE_ATTACK] * bool(report.attacked_differences), *report.warnings]
    return "\n\n".join([render_text(outcome_rows(report)), *(textwrap.fill(one_line(n), SCREEN_WIDTH) for n in notes)])


def limits_in_words(limits: Sequence[Limit]) -> str:
    """Return how far each measure may move.

    Args:
        limits: The limits.

    Returns:
        The limits in a line.

    Example:
        >>> limits_in_words([Limit("asr", 0.02), Limit("kl", 0.1)])
        'attack success +2 points, KL divergence from the aligned model +0.1'
    """
    return ", ".join(
        f"{WORDS.get(limit.measure, limit.measure)} {'+' if limit.higher_is_worse else '-'}{_most(limit)}"
        for limit in limits
    )


def render_markdown(report: AutoReport, selection: Selection | None = None) -> str:
    """Return the report as a page.

    Args:
        report: The report.
        selection: The candidates; None where none was measured.

    Returns:
        Markdown; text from files is escaped, and no prompt or answer is in it.
    """
    parts = ["# Hardening, chosen automatically", _summary(report)]
    choices: Rows = [("", "", "why"), *((item.name, item.value, item.reason) for item in report.choices)]
    parts += ["## What was settled", markdown_table(choices)]
    if report.checked:
        rows: Rows = [("", "measured"), *((name, in_words(score)) for name, score in report.checked.items())]
        parts += ["## Can hardening help?", "On the prompts to choose by.", markdown_table(rows)]
    if report.config is not None:
        parts += [f"## Why {escape(report.recommended)}", *map(escape, report.reasons)]
        parts += ["## Before and after", NOT_CHOSEN_BY]
        parts += [markdown_table(outcome_rows(report)), *[ONE_ATTACK] * bool(report.attacked_differences)]
    parts += [f"**{escape(warning)}**" for warning in report.warnings]
    if selection is not None:
        parts += ["## What was tried", "On the prompts to choose by.", markdown_table(selection_rows(selection))]
        parts += [LEGEND, *[f"![the candidates]({FIGURE}.png)"] * _is_drawn(selection)]
    return "\n\n".join([*parts, HONESTY]) + "\n"


def written_files(selection: Selection | None) -> dict[str, str]:
    """Return what a run leaves, by what it is, relative to its folder.

    Args:
        selection: The candidates; None where none was measured.

    Returns:
        Files and folders.
    """
    files = {"report": PAGE_NAME, "record": REPORT_NAME}
    if selection is not None:
        files["selection"] = f"{SELECTION}/{RECORD_NAME}"
        if _is_drawn(selection):
            files["figure"] = f"{FIGURE}.png"
        if selection.recommended is not None:
            files |= {"hardened model": HARDENED, "settings": CONFIG_NAME}
    return files


def save_report(report: AutoReport, selection: Selection | None, folder: RunFolder) -> None:
    """Write the page, the figure, and last the record, by which a run is known to be finished.

    Args:
        report: The report.
        selection: The candidates; None where none was measured.
        folder: The open folder of the run.

    Raises:
        ConfigError: If matplotlib is not installed.
        OutputError: If a file cannot be written.
    """
    if selection is not None and _is_drawn(selection) and folder.folder is not None:
        from lox_hf.plots.selection import save_selection_plot

        save_selection_plot(selection, folder.folder / FIGURE)
    folder.write(PAGE_NAME, render_markdown(report, selection))
    folder.write(REPORT_NAME, report.to_json())


def _is_drawn(selection: Selection) -> bool:
    """Whether something was measured that has a limit, which is what the figure shows."""
    return any(is_judged(limit, selection.aligned_score) for limit in selection.limits)


def _most(limit: Limit) -> str:
    if limit.relative:
        return f"{100 * limit.most:g} %"
    return f"{limit.most:g}" if limit.measure in FIGURES else f"{100 * limit.most:g} points"


def _summary(report: AutoReport) -> str:
    name = escape(report.aligned.name_or_path)
    if report.stopped:
        return f"Nothing was hardened. {escape(report.stopped)}"
    return f"`{HARDENED}/` is {name}, hardened with {escape(report.recommended)}."


def _rows(before: Score, after: Score, differences: dict[str, PairedDifference]) -> Rows:
    names = [name for name in WORDS if name in {*before.names(), *after.names()}]
    return [(WORDS[name], _value(before, name), _value(after, name), *_cells(differences.get(name))) for name in names]


def _cells(found: PairedDifference | None) -> tuple[str, str, str, str]:
    if found is None or not found.before.n:
        return "", "", "", ""
    interval = f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
    return f"{100 * found.difference:+.1f} points", interval, f"{found.p_value:.2g}", str(found.before.n)


def _value(score: Score, name: str) -> str:
    value = score.value(name)
    if math.isnan(value):
        return "never" if name == "steps_to_half" else "not known"
    return f"{100 * value:.1f} %" if name in score.rates or name in SHARES else f"{value:.3g}"
