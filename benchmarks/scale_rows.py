"""The rows of `scale.py`: what each one runs, and how it is judged."""

from __future__ import annotations

import filecmp
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import Child, clear_output, run_job, warm
from rows import Bench, cost, count, difference, folders, mib
from table import Row

PROCESSES = 2
FASTER = 1.7
BACKENDS = {"fsdp2": "FSDP2", "zero3": "DeepSpeed ZeRO-3"}
BEYOND_SHARE = 0.1
SIZES = ("llama-0.13b", "llama-0.37b", "llama-1.3b", "llama-3.4b")
QUICK_SIZES = ("quick-exact", "quick-small", "quick-large")
EVEN = 0.15
REPORT_NAME = "lox_report.json"
"""The one file that differs between two runs: it holds the time."""


def processes(bench: Bench) -> Iterator[Row]:
    """Compare the wall time of one process with that of several, A B A B, and the files that they leave."""
    pair, outputs = bench.large, {}
    runs: dict[int, list[Child]] = {1: [], PROCESSES: []}
    for _ in range(bench.repeats):
        for number, found in runs.items():
            outputs[number] = bench.output(f"hardened-by-{number}")
            warm(folders(pair))
            arguments = bench.arguments(pair) | {"output": str(outputs[number])}
            found.append(run_job("jobs.py", "harden", arguments, bench.cpu_threads, processes=number))
    yield _faster(runs, count(pair))
    names, differing = _different_files(outputs[1], outputs[PROCESSES])
    yield Row(
        f"  files of {PROCESSES} processes that differ from those of one, but for the report, which holds the time",
        "none",
        f"{len(differing)} of {len(names)}{': ' if differing else ''}{', '.join(differing)}",
        not differing and bool(names),
        correctness=True,
        details={"files": names},
    )
    for output in outputs.values():
        clear_output(output)


def sharded(bench: Bench) -> Iterator[Row]:
    """Judge `apply_lox` on a model in pieces: the result against one process, and the memory of each process."""
    pair, whole = bench.large, bench.output("alone")
    arguments = bench.arguments(pair)
    alone = run_job("scale_sharded.py", "alone", arguments | {"output": str(whole)}, bench.cpu_threads)
    alone_s = alone.result["end_s"] - alone.result["start_s"]
    for backend, name in BACKENDS.items():
        output = bench.output(backend)
        options = arguments | {"output": str(output)}
        child = run_job("scale_sharded.py", backend, options, bench.cpu_threads, sample=True, processes=PROCESSES)
        both = {"first": str(whole), "second": str(output), "aligned": pair["aligned"]}
        found = run_job("accuracy.py", "folders", both, bench.cpu_threads).result
        met = found["differing_share"] <= 1e-3 and found["max_ulps"] <= 1
        figure = f"apply_lox on {PROCESSES} processes, {name}, {count(pair)}: entries that differ from one process"
        yield Row(figure, "at most 1e-3, by one ulp", difference(found), met, correctness=True, details=found)
        yield _memory_of_each(child, f"{name}, {count(pair)}", alone_s)
        clear_output(output)
    clear_output(whole)


def sizes(bench: Bench) -> Iterator[Row]:
    """Judge how CPU-seconds and memory grow with the size of the model."""
    first = bench.pair("quick-exact", bench.spectrum)
    runs: dict[str, list[Child]] = {}
    parameters = []
    for name in QUICK_SIZES if bench.quick else SIZES:
        pair = bench.pair(name, bench.spectrum)
        warm(folders(pair))
        runs[count(pair)] = [_harden_again(bench, first, pair) for _ in range(bench.repeats)]
        parameters.append(pair["parameters"])
    yield _straight(runs, parameters)
    yield _flat(runs)


def _faster(runs: dict[int, list[Child]], size: str) -> Row:
    """Judge the calls alone; whole commands also import torch, several times, and are shown beside them."""
    calls = [[run.result["call_s"] for run in found] for found in runs.values()]
    wholes = [[run.wall_s for run in found] for found in runs.values()]
    ratios = [one / other for one, other in zip(*calls, strict=True)]
    ratio = statistics.median(ratios)
    measured = (
        f"{ratio:.2f}x ({_medians(calls)}; ratios {', '.join(f'{value:.2f}' for value in ratios)}; "
        f"whole commands, imports included, {_medians(wholes)})"
    )
    figure = f"{size}, wall of harden_checkpoint, warm cache: {PROCESSES} processes against 1, one thread each"
    details = {str(number): [cost(run) for run in found] for number, found in runs.items()}
    return Row(figure, f"at least {FASTER}x", measured, ratio >= FASTER, details=details)


def _medians(sides: list[list[float]]) -> str:
    return " against ".join(f"{statistics.median(seconds):.1f} s" for seconds in sides)


def _different_files(one: Path, other: Path) -> tuple[list[str], list[str]]:
    """Return the names of all files of two folders but the report, and of those that are not equal to the byte."""
    files = {path.name for folder in (one, other) for path in folder.iterdir()} - {REPORT_NAME}
    _, differing, missing = filecmp.cmpfiles(one, other, files, shallow=False)
    return sorted(files), sorted(differing + missing)


def _memory_of_each(child: Child, what: str, alone_s: float) -> Row:
    """Judge the anonymous memory of each process during the call, less what it held before, against its share."""
    members = child.result["processes"]
    growths = [child.peak_between(own["start_s"], own["end_s"], own["pid"]) - own["before_bytes"] for own in members]
    shares = [own["share_bytes"] for own in members]
    call_s = max(own["end_s"] - own["start_s"] for own in members)
    measured = (
        f"{', '.join(f'{mib(growth)} ({growth / share:.1%})' for growth, share in zip(growths, shares, strict=True))} "
        f"beyond {', '.join(map(mib, shares))} (call {call_s:.1f} s, one process {alone_s:.1f} s)"
    )
    met = all(growth <= BEYOND_SHARE * share for growth, share in zip(growths, shares, strict=True))
    figure = f"  memory of each process during apply_lox beyond its share, {what} (sampled every 5 ms)"
    return Row(figure, f"at most {BEYOND_SHARE:.0%} of its share", measured, met, details={"processes": members})


def _harden_again(bench: Bench, first: dict[str, Any], pair: dict[str, Any]) -> Child:
    """Harden a pair in a process that has hardened a tiny one before: what is left is work."""
    tiny = {"aligned": first["aligned"], "base": first["base"], "output": str(bench.output("first"))}
    arguments = bench.arguments(pair) | {"output": str(bench.output("hardened")), "first": tiny}
    return run_job("jobs.py", "harden-again", arguments, bench.cpu_threads, sample=True)


def _straight(runs: dict[str, list[Child]], parameters: list[int]) -> Row:
    """Judge how far the cost of any size is from the nearest straight line without a constant part."""
    seconds = [statistics.median(run.result["cpu_s"] for run in found) for found in runs.values()]
    costs = [1e9 * value / number for value, number in zip(seconds, parameters, strict=True)]
    line = (min(costs) + max(costs)) / 2
    off = max(costs) / line - 1
    passes = [max(run.result["max_steps"] for run in found) for found in runs.values()]
    parts = (
        f"{name} {value:.1f} ns ({spent:.1f} s, up to {steps} passes)"
        for name, value, spent, steps in zip(runs, costs, seconds, passes, strict=True)
    )
    return Row(
        "CPU-seconds of the work of harden_checkpoint per parameter, by size, one thread",
        f"within {EVEN:.0%} of a straight line",
        f"within {off:.0%} of {line:.1f} ns: {', '.join(parts)}",
        off <= EVEN,
        details={name: [cost(run) for run in found] for name, found in runs.items()},
    )


def _flat(runs: dict[str, list[Child]]) -> Row:
    """Judge how much the memory of the whole process differs over the sizes."""
    peaks = {name: max(run.peak_anonymous_bytes for run in found) for name, found in runs.items()}
    spread = max(peaks.values()) / min(peaks.values()) - 1
    return Row(
        "  peak anonymous memory of the same processes, imports included (sampled every 5 ms)",
        f"flat: the largest at most {EVEN:.0%} over the smallest",
        f"{spread:.0%}: {', '.join(f'{name} {mib(peak)}' for name, peak in peaks.items())}",
        spread <= EVEN,
        details={"peaks_bytes": peaks},
    )
