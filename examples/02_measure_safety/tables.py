"""What the reports and the answers say, as tables for the screen."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lox_hf import PairedDifference, SafetyComparison, SafetyReport

OPENING_WORDS = 6
MEASURES = {"attack success": "asr", "over-refusal": "over_refusal"}


def render_rates(reports: Mapping[str, Mapping[str, SafetyReport]]) -> str:
    """Render the rates of every model on every set.

    Args:
        reports: Reports by set and model.

    Returns:
        A row for every rate that was measured, a column for every model.
    """
    models = list(next(iter(reports.values())))
    rows = [["share with 95 % Wilson interval", *models]]
    for measure, field in MEASURES.items():
        for name, by_model in reports.items():
            rates = [getattr(report, field) for report in by_model.values()]
            if any(rate.n for rate in rates):
                rows.append([f"{name}: {measure}", *map(str, rates)])
    return _render(rows)


def render_changes(changes: Mapping[str, SafetyComparison]) -> str:
    """Render what hardening changed, over the prompts that both models answered.

    Args:
        changes: Comparisons by set.

    Returns:
        A row for every rate.
    """
    rows = [["aligned to hardened", "change", "95 % interval", "p (McNemar)"]]
    for measure, field in MEASURES.items():
        for name, change in changes.items():
            found: PairedDifference = getattr(change, field)
            if found.before.n:
                interval = f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
                points = f"{100 * found.difference:+.1f} points"
                rows.append([f"{name}: {measure}", points, interval, f"{found.p_value:.2g}"])
    return _render(rows)


def render_openings(runs: Mapping[str, Path]) -> str:
    """Render how each model opens most of its answers to harmful prompts.

    Args:
        runs: Folders of `lox-hf asr` runs by model.

    Returns:
        The most frequent first words, a row for every model.
    """
    rows = [["most frequent opening of an answer", "", ""]]
    for model, run in runs.items():
        answers = [row["response"] for row in read_answers(run) if row["harmful"]]
        ((opening, count),) = Counter(" ".join(text.split()[:OPENING_WORDS]) for text in answers).most_common(1)
        rows.append([model, f"{opening} ...", f"{count} of {len(answers)}"])
    return _render(rows)


def read_answers(run: Path) -> list[dict[str, Any]]:
    """Read the answers that a `lox-hf asr` run has kept: a line each, as they came.

    Args:
        run: Folder of the run.

    Returns:
        Rows of position, prompt, harmful, category and response.
    """
    return [json.loads(line) for line in (run / "generations.jsonl").read_text(encoding="utf-8").splitlines()]


def _render(rows: list[list[str]]) -> str:
    """The first row is a header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n" + "\n".join(lines)
