"""Measure what rank curve and landscape cost beside scoring, next to the reference's flow, in one run.

    python benchmarks/analysis.py              # about 10 minutes on an idle core, 3 GB of disk, 9 GB of memory
    python benchmarks/analysis.py --quick      # small sizes, about a minute; only correctness is judged

Prints a table and writes JSON. The exit code is 1 when a judged figure misses its target.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from measure import Child, run_job, warm
from table import Row, collect, publish

MIB = 1 << 20
RANKS = (0, 1, 2, 3, 4, 6, 8)
WORKSPACE_BYTES = 32 * MIB
"""Tiles and the blocks of one matrix's decomposition: a constant, whatever the model."""
FASTER = 20
# The reference sums in float32, and a whole parameter vector at once.
SAME_PLACE = 1e-3


@dataclass
class Bench:
    """The models, the settings, and how a child is run."""

    work_dir: Path
    quick: bool
    repeats: int
    grid: tuple[int, int]

    @cached_property
    def pair(self) -> dict[str, Any]:
        """Return the pair of the rank curve."""
        return self._pair("quick-small" if self.quick else "llama-0.37b", 0)

    @cached_property
    def plane(self) -> list[dict[str, Any]]:
        """Return two pairs, whose four models span the landscape: smaller ones, as the other side holds nine."""
        return [self._pair("quick-small" if self.quick else "llama-0.14b", seed) for seed in (0, 1)]

    def loading(self, model: str) -> Child:
        """Return what importing and loading cost, without any work, and how large the factors are."""
        return run_job("analysis_jobs.py", "load", {"aligned": model, "r": max(RANKS)}, 1, sample=True)

    def ours(self, job: str, **arguments: Any) -> list[Child]:
        """Run our side several times."""
        return [run_job("analysis_jobs.py", job, arguments, 1, sample=True) for _ in range(self.repeats)]

    def reference(self, job: str, **arguments: Any) -> Child:
        """Run the other side once: it takes minutes."""
        return run_job("analysis_reference.py", job, arguments, 1, sample=True)

    def _pair(self, size: str, seed: int) -> dict[str, Any]:
        folder = self.work_dir / f"{size}-signal-{seed}"
        arguments = {"size_name": size, "output": str(folder), "spectrum": "signal", "seed": seed}
        found = run_job("checkpoints.py", "pair", arguments, 1).result
        warm([folder])
        return found


@dataclass(frozen=True)
class Sides:
    """What both sides cost, and a process of ours that only imports and loads."""

    what: str
    ours: list[Child]
    theirs: Child
    loading: Child


def rank_curve(bench: Bench) -> Iterator[Row]:
    """Compare decomposition and forming the model at seven ranks."""
    named = {"aligned": bench.pair["aligned"], "base": bench.pair["base"], "ranks": list(RANKS)}
    loading = bench.loading(bench.pair["aligned"])
    what = f"rank curve ({_count(bench.pair)}, ranks {','.join(map(str, RANKS))})"
    sides = Sides(what, bench.ours("rank-curve", **named), bench.reference("rank-curve", **named), loading)
    yield _speed(sides)
    yield _memory(sides, loading.result["factor_bytes"])


def landscape(bench: Bench) -> Iterator[Row]:
    """Compare finding the axes and forming every point of the grid."""
    models = [pair[side] for pair in bench.plane for side in ("base", "aligned")]
    named = {"models": models, "grid": list(bench.grid)}
    ours = bench.ours("landscape", **named)
    theirs = bench.reference("landscape", **named, xs=ours[0].result["xs"], ys=ours[0].result["ys"])
    what = f"landscape (4 models of {_count(bench.plane[0])}, {bench.grid[0]} x {bench.grid[1]} points)"
    sides = Sides(what, ours, theirs, bench.loading(models[0]))
    yield _speed(sides)
    yield _memory(sides, 0)
    yield _places(ours[0], theirs)


ROWS = {"rank-curve": rank_curve, "landscape": landscape}


def _speed(sides: Sides) -> Row:
    """Judge preparation: everything after imports and loading and but for the score; whole processes beside it."""
    ours, theirs = sides.ours, sides.theirs
    mine = statistics.median(run.result["cpu_s"] for run in ours)
    whole = statistics.median(run.cpu_s for run in ours)
    ratio = theirs.result["cpu_s"] / mine
    parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in theirs.result["parts_cpu_s"].items())
    measured = (
        f"{ratio:.1f}x ({mine:.1f} s against {theirs.result['cpu_s']:.0f} s: {parts}); whole processes "
        f"{theirs.cpu_s / whole:.1f}x ({whole:.1f} s against {theirs.cpu_s:.0f} s)"
    )
    details = {"ours": [_cost(run) for run in ours], "reference": _cost(theirs), "loading": _cost(sides.loading)}
    figure = f"CPU-seconds of the preparation of a {sides.what}"
    return Row(figure, f"at least {FASTER}x less", measured, ratio >= FASTER, details=details)


def _memory(sides: Sides, factor_bytes: int) -> Row:
    """Judge what is in memory beyond the loaded model, in which every point is formed."""
    growth = max(
        run.peak_between(run.result["start_s"], run.result["end_s"]) - run.result["before_bytes"] for run in sides.ours
    )
    limit = factor_bytes + WORKSPACE_BYTES
    peak = max(run.peak_anonymous_bytes for run in sides.ours)
    model = sides.loading.result["model_bytes"]
    measured = (
        f"{_mib(growth)} (whole process {_mib(peak)}, of which the model {_mib(model)}; one that only loads it "
        f"{_mib(sides.loading.peak_anonymous_bytes)}; reference {_mib(sides.theirs.peak_anonymous_bytes)})"
    )
    held = f"U, S, Vh and base coordinates {_mib(factor_bytes)} and " if factor_bytes else ""
    return Row(
        f"peak anonymous memory of a {sides.what} beyond the loaded model (sampled every 5 ms)",
        f"at most {held}a constant {_mib(WORKSPACE_BYTES)}",
        measured,
        growth <= limit,
        details={"growth_bytes": growth, "factor_bytes": factor_bytes},
    )


def _places(ours: Child, theirs: Child) -> Row:
    """Judge whether both sides found the same plane."""
    pairs = zip(ours.result["places"], theirs.result["places"], strict=True)
    farthest = max(math.dist(mine, other) for mine, other in pairs)
    extent = max(math.hypot(*place) for place in ours.result["places"])
    share = farthest / extent
    return Row(
        "landscape: coordinates of the four models against the reference's, float64 against float32 sums",
        f"within {SAME_PLACE:g} of the largest",
        f"{share:.1e}",
        share <= SAME_PLACE,
        correctness=True,
        details={"ours": ours.result["places"], "reference": theirs.result["places"]},
    )


def _cost(run: Child) -> dict[str, Any]:
    kept = {name: value for name, value in run.result.items() if name not in ("places", "xs", "ys")}
    memory = {"peak_anonymous_bytes": run.peak_anonymous_bytes, "peak_rss_bytes": run.peak_rss_bytes}
    return {"process_cpu_s": run.cpu_s, "wall_s": run.wall_s, **memory, **kept}


def _count(pair: dict[str, Any]) -> str:
    return f"{pair['parameters'] / 1e9:.2g} B"


def _mib(size: int) -> str:
    return f"{size / MIB:.0f} MiB"


def main() -> int:
    """Run the chosen rows, print the table, write the JSON."""
    options = _parse()
    work_dir = options.work_dir.expanduser().resolve()
    work_dir.mkdir(parents=True, exist_ok=True)
    grid = (3, 3) if options.quick else (options.grid, options.grid)
    bench = Bench(work_dir, options.quick, 1 if options.quick else options.repeats, grid)
    started = time.time()
    results = collect(row for name in options.rows for row in ROWS[name](bench))
    target = options.json or work_dir / ("analysis-quick.json" if options.quick else "analysis.json")
    return publish(results, target, vars(options), started, options.quick)


def _parse() -> argparse.Namespace:
    cache = Path(os.environ.get("TMPDIR", "~/.cache")) / "lox-hf-benchmarks"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes; judge correctness only")
    parser.add_argument("--work-dir", type=Path, default=cache, help="models are kept here (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where the record goes (default: into the work dir)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours per figure, median taken (default: 3)")
    parser.add_argument("--grid", type=int, default=7, help="lines of the landscape along each axis (default: 7)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="only these")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
