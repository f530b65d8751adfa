"""Reports as tables, on the screen and in Markdown, from the same rows."""

import math
import textwrap
from collections.abc import Sequence

from lox_hf.markdown import escape, markdown_table, one_line
from lox_hf.records import JudgeAgreement, PairedDifference, Rate, SafetyComparison, SafetyReport, SafetyRun

HONESTY = (
    "A judge's verdicts are not the truth: read a sample of the responses. LoX raises the cost of losing safety, it "
    "does not make a model safe; these prompts are no adaptive attack."
)
HARM_NOTE = "By this judge, refused means that the response is not harmful; it need not be a refusal."
SCREEN_WIDTH = 110
KNOWN_HARMFUL = "harmful and the known answer given"
KNOWN_HARMLESS = "harmless and the known answer given"
HEADER = ("", "rate", "95 % interval", "count", "n", "unscored")

Rows = list[tuple[str, ...]]


def report_rows(report: SafetyReport) -> Rows:
    """Rates of a report, a row each, with a header; a rate over no prompts has no row but the first.

    Args:
        report: The report.

    Returns:
        Rows of cells, the header first.
    """
    named = [
        ("attack success rate", report.asr),
        ("refused", report.refusal),
        ("degenerate", report.degenerate),
        ("over-refusal (harmless prompts refused)", report.over_refusal),
        (KNOWN_HARMFUL, report.strict_asr),
        (KNOWN_HARMLESS, report.accuracy),
    ]
    if report.rubric is not None:
        named += [("score 5", report.rubric.five), ("score 4 or 5", report.rubric.four_or_five)]
    shown = [(name, rate) for name, rate in named if name == named[0][0] or rate.n or rate.unscored]
    rows = [HEADER, *(_row(name, rate) for name, rate in shown)]
    if report.rubric is not None:
        rows.append(("mean score, 1 to 5", f"{report.rubric.mean:.2f}", "", "", str(report.rubric.five.n), ""))
    return rows


def category_rows(report: SafetyReport) -> Rows:
    """Rates per category, with a header; empty where the prompts have none."""
    rows = []
    for category in report.categories:
        if category.asr.n or category.asr.unscored:
            rows.append(_row(f"{category.name}: attack success", category.asr))
        if category.over_refusal.n or category.over_refusal.unscored:
            rows.append(_row(f"{category.name}: over-refusal", category.over_refusal))
    return [HEADER, *rows] if rows else []


def unscored_rows(report: SafetyReport) -> Rows:
    """Why responses are unscored and how many, with a header; empty where all are scored."""
    rows = [(reason, str(count)) for reason, count in report.unscored_reasons.items()]
    return [("unscored because", "n"), *rows] if rows else []


def comparison_rows(comparison: SafetyComparison) -> Rows:
    """Rates before and after with what changed, with a header."""
    named = {
        "attack success rate": comparison.asr,
        "refused": comparison.refusal,
        "over-refusal": comparison.over_refusal,
        "degenerate": comparison.degenerate,
        KNOWN_HARMFUL: comparison.strict_asr,
        KNOWN_HARMLESS: comparison.accuracy,
    }
    header = ("", "before", "after", "difference", "95 % interval", "p (McNemar)", "pairs")
    return [header, *(_comparison_row(name, found) for name, found in named.items() if found.before.n)]


def agreement_rows(agreements: Sequence[JudgeAgreement]) -> Rows:
    """Agreement of judges, with a header; empty where there is one judge only."""
    header = ("judges", "agree on", "Cohen's kappa", "both complied", "only first", "only second", "neither")
    rows = [
        (
            " and ".join(found.judges),
            str(found.agreement),
            "not defined" if math.isnan(found.kappa) else f"{found.kappa:.2f}",
            *map(str, (found.both_complied, found.only_first, found.only_second, found.neither)),
        )
        for found in agreements
    ]
    return [header, *rows] if rows else []


def render_text(rows: Rows) -> str:
    """Rows as an aligned table for a terminal; control characters are taken out.

    Args:
        rows: Rows of cells.

    Returns:
        The table, a line a row.
    """
    clean = [tuple(one_line(cell) for cell in row) for row in rows]
    widths = [max(len(row[column]) for row in clean) for column in range(len(clean[0]))]
    lines = [
        "  ".join(cell.ljust(width) if not number else cell.rjust(width) for number, (cell, width) in enumerate(cells))
        for cells in (zip(row, widths, strict=True) for row in clean)
    ]
    return "\n".join(line.rstrip() for line in lines)


def render_screen(run: SafetyRun) -> str:
    """A run as plain text for a terminal.

    Args:
        run: The run.

    Returns:
        Tables and what has to be said beside them.
    """
    parts = []
    for report in run.reports:
        parts.append(f"Judge: {one_line(report.judge)}\n{render_text(report_rows(report))}")
        parts += [render_text(rows) for rows in (category_rows(report), unscored_rows(report)) if rows]
        if report.judge != report.over_refusal_judge:
            parts.append(HARM_NOTE)
    if run.agreements:
        parts.append(render_text(agreement_rows(run.agreements)))
    if run.comparison is not None:
        parts.append(
            "\n".join(
                [_against(run.comparison), render_text(comparison_rows(run.comparison)), *_notes(run.comparison)]
            )
        )
    return "\n\n".join([*parts, textwrap.fill(HONESTY, SCREEN_WIDTH)])


def render_markdown(run: SafetyRun) -> str:
    """A run as a Markdown page.

    Args:
        run: The run.

    Returns:
        The page. It holds no prompt and no response, and text from models and files is escaped.
    """
    first = run.reports[0]
    about = {
        "model": first.model.name_or_path if first.model else "responses that were given",
        "prompts": f"{first.prompts.get('name') or 'given'}, {first.prompts.get('n')}",
        **{name.replace("_", " "): value for name, value in first.generation.items() if value not in (None, {})},
        "versions": ", ".join(f"{name} {version}" for name, version in first.versions.items()),
    }
    parts = ["# Safety report", markdown_table([("", ""), *((name, str(value)) for name, value in about.items())])]
    for report in run.reports:
        parts += [f"## Judge: {escape(report.judge)}", *_judged(report)]
    if run.agreements:
        parts += ["## Agreement", markdown_table(agreement_rows(run.agreements))]
    if run.comparison is not None:
        parts += [
            "## Against the earlier run",
            escape(_against(run.comparison)),
            markdown_table(comparison_rows(run.comparison)),
        ]
        parts += map(escape, _notes(run.comparison))
    return "\n\n".join([*parts, HONESTY]) + "\n"


def _judged(report: SafetyReport) -> list[str]:
    parts = [markdown_table(report_rows(report))]
    if report.judge != report.over_refusal_judge:
        parts.append(HARM_NOTE)
    if rows := category_rows(report):
        parts.append(markdown_table(rows))
    if rows := unscored_rows(report):
        parts.append(markdown_table(rows))
    return [*parts, *(f"**{escape(warning)}**" for warning in report.warnings)]


def _row(name: str, rate: Rate) -> tuple[str, ...]:
    if rate.n == 0:
        return name, "not known", "", "", "0", str(rate.unscored)
    interval = f"{100 * rate.low:.1f} to {100 * rate.high:.1f} %"
    return name, f"{100 * rate.share:.1f} %", interval, str(rate.count), str(rate.n), str(rate.unscored)


def _comparison_row(name: str, found: PairedDifference) -> tuple[str, ...]:
    return (
        name,
        f"{100 * found.before.share:.1f} %",
        f"{100 * found.after.share:.1f} %",
        f"{100 * found.difference:+.1f} points",
        f"{100 * found.low:+.1f} to {100 * found.high:+.1f}",
        f"{found.p_value:.2g}",
        str(found.before.n),
    )


def _against(comparison: SafetyComparison) -> str:
    before, after = comparison.models
    named = f" {one_line(before)} (before), {one_line(after)} (after)" if before and after else ""
    return f"Against the earlier run:{named}"


def _notes(comparison: SafetyComparison) -> list[str]:
    unpaired = f"{comparison.unpaired} prompts are in one run only, or unscored in one."
    return [*comparison.warnings, *[unpaired] * bool(comparison.unpaired)]
