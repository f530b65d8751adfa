"""A table of figures: what was measured, against which target, met or missed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from measure import machine


@dataclass(frozen=True)
class Row:
    """One line of the table; `met` is None where the figure is information only."""

    figure: str
    target: str
    measured: str
    met: bool | None
    correctness: bool = False
    details: dict[str, Any] = field(default_factory=dict)


def collect(rows: Iterable[Row]) -> list[Row]:
    """Return all rows, and show each on stderr as soon as it is measured."""
    results = []
    for row in rows:
        print(f"{row.figure}: {row.measured}", file=sys.stderr, flush=True)
        results.append(row)
    return results


def verdict(row: Row, quick: bool) -> str:
    """Return the last column; a quick run is too small for a judgement on speed and memory."""
    if row.met is None or (quick and not row.correctness):
        return "-"
    return "met" if row.met else "MISSED"


def publish(results: list[Row], target: Path, settings: dict[str, Any], started: float, quick: bool) -> int:
    """Print the table, write the JSON, and return the exit code: 1 where a judged figure misses its target."""
    lines = [("figure", "target", "measured", "verdict"), ("---",) * 4]
    lines += [(row.figure, row.target, row.measured, verdict(row, quick)) for row in results]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
    content = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()},
        "machine": machine(),
        "seconds": time.time() - started,
        "rows": [asdict(row) | {"verdict": verdict(row, quick)} for row in results],
    }
    target.write_text(json.dumps(content, indent=2) + "\n")
    print(f"\n{content['seconds']:.0f} s; details in {target}")
    return int(any(verdict(row, quick) == "MISSED" for row in results))
