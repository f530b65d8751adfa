"""The rows of `scale.py` about an accelerator."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from typing import Any

from measure import run_job
from rows import Bench, difference, mib
from table import Row

AT_MOST_S = 3.0
SLOWER = 30
GB = 1e9
UNMEASURED = "not measured: no accelerator"
FIGURES = {
    "device": ("apply_lox on a live model on {}, base on the device", f"at most {AT_MOST_S:g} s"),
    "host": ("apply_lox on a live model on {}, base in host memory", f"at most {AT_MOST_S:g} s"),
    "svd": ("torch.linalg.svd of all matrices on {}, one a shape times its count", f"at least {SLOWER}x slower"),
    "entries": (
        "  entries there that differ from those by the full SVD, one matrix a shape",
        "at most 1e-3, by one ulp",
    ),
}


def on_device(bench: Bench, device: str) -> Iterator[Row]:
    """Judge `apply_lox` on a live model that lies on an accelerator, in the shapes of Llama-2-7B."""
    found = run_job("scale_device.py", "find", {"device": device}, bench.cpu_threads).result
    if not found:
        for figure, target in FIGURES.values():
            yield Row(figure.format("an accelerator"), target, UNMEASURED, None)
        return
    options = {"device": found["device"], "quick": bench.quick, "repeats": bench.repeats}
    settings = {"r": bench.r, "alpha": bench.alpha}
    cores = len(os.sched_getaffinity(0))  # the host solves the small problems, one a thread, and feeds the device
    result = run_job("scale_device.py", "measure", options | settings, cores).result
    name = f"{found['name']} ({result['parameters'] / 1e9:.2g} B)"
    moved = {"device": 3 * result["state_bytes"], "host": result["state_bytes"]}
    for where in moved:
        yield _hardening(where, name, result, moved[where])
    yield _dense(name, result)
    figure, target = FIGURES["entries"]
    differences = result["differences"]
    met = differences["differing_share"] <= 1e-3 and differences["max_ulps"] <= 1
    yield Row(figure, target, difference(differences), met, correctness=True, details=differences)


def _median_s(result: dict[str, Any], where: str) -> float:
    """Return the seconds of `apply_lox`, of all runs but the first."""
    return statistics.median(run["seconds"] for run in result["runs"][where][1:])


def _hardening(where: str, name: str, result: dict[str, Any], moved_bytes: int) -> Row:
    """Judge the time; the bytes that have to move at least stand beside it, against a plain copy.

    On the device the weights and the base are read and the weights written, once each; from the host the base comes
    once.
    """
    figure, target = FIGURES[where]
    runs, rate = result["runs"][where], result["copy_bytes_per_s"][where]
    seconds = _median_s(result, where)
    peak = max((run["peak_beyond_bytes"] or 0) for run in runs)
    measured = (
        f"{seconds:.2f} s (first call {runs[0]['seconds']:.2f} s); {moved_bytes / GB:.1f} GB moved at "
        f"{moved_bytes / seconds / GB:.0f} GB/s, {moved_bytes / seconds / rate:.0%} of a copy's {rate / GB:.0f} GB/s"
        f"{f'; {mib(peak)} of the device beyond what lay there' if peak else ''}"
    )
    return Row(figure.format(name), target, measured, seconds <= AT_MOST_S, details=result)


def _dense(name: str, result: dict[str, Any]) -> Row:
    figure, target = FIGURES["svd"]
    ours = _median_s(result, "device")
    ratio = result["svd_s"] / ours
    measured = f"{ratio:.0f}x slower ({result['svd_s']:.0f} s against {ours:.2f} s)"
    return Row(figure.format(name), target, measured, ratio >= SLOWER, details={"svds": result["svds"]})
