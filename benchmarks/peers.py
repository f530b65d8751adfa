"""Rows of information: programs of others on the same pair, where they are installed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from measure import ChildError, clear_output, run_child
from rows import Bench
from table import Row


def mergekit(bench: Bench) -> Iterator[Row]:
    """Time mergekit's LoRA extraction at the same rank, where mergekit is installed."""
    script = shutil.which("mergekit-extract-lora", path=str(Path(sys.executable).parent)) or shutil.which(
        "mergekit-extract-lora"
    )
    if script is None:
        return
    output = bench.output("mergekit")
    pair = bench.small
    options = ["--model", pair["aligned"], "--base-model", pair["base"], "--out-path", str(output)]
    command = [script, *options, "--max-rank", str(bench.r), "--embed-lora"]
    yield _timed(bench, f"mergekit-extract-lora, rank {bench.r}", command, output)


def reference_script(bench: Bench, script: Path) -> Iterator[Row]:
    """Time the reference's own script, unmodified."""
    output = bench.output("reference-script")
    pair = bench.small
    options = ["--model", pair["aligned"], "--base-model", pair["base"], "--save-path", str(output)]
    command = [sys.executable, str(script), *options, "--k", str(bench.r), "--coef", str(bench.alpha)]
    yield _timed(bench, f"the reference's own {script.name}", command, output)


def _timed(bench: Bench, name: str, command: Sequence[str], output: Path) -> Row:
    figure = f"  {name}: CPU-seconds, wall, peak anonymous memory, RSS"
    try:
        child = run_child(command, bench.cpu_threads, sample=True)
    except ChildError as error:
        return Row(figure, "information", "did not run", None, details={"error": str(error)})
    finally:
        clear_output(output)
    peaks = f"{child.peak_anonymous_bytes / 2**20:.0f} MiB, {child.peak_rss_bytes / 2**20:.0f} MiB"
    return Row(figure, "information", f"{child.cpu_s:.1f} s, {child.wall_s:.1f} s, {peaks}", None)
