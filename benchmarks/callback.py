"""Measure every figure that lox_hf promises about `LoxCallback`, both sides in one run.

    python benchmarks/callback.py                      # everything, about 13 minutes on one core
    python benchmarks/callback.py --quick              # small sizes; only correctness is judged
    python benchmarks/callback.py --only memory        # one figure; see --help for the names
    python benchmarks/callback.py --reference CHECKOUT # also runs the reference's own safety/R_metrics.py

Prints a table and writes JSON. The exit code is 1 when a judged figure misses its target.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from measure import Child, run_job
from table import Row, collect, publish

SCRIPT = "callback_processes.py"
EVERY = 50  # steps between readings, of the figure that is promised
MOST_SHARE = 0.01
KNOWN_SHARE = 1e-3
SAME_METRIC = 1e-4
SAME_READING = 1e-5
BATCH = (4, 128)  # sequences x tokens: modest, as a large one would make steps longer and the share smaller
SHORT_BATCH = (1, 16)  # steps so short that readings can be told from the noise of whole runs
# What is freed goes back to the system at once: otherwise two equal runs differ by more than all factors take.
TIGHT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
MIB = 1 << 20


@dataclass
class Bench:
    """Settings, and what several rows share."""

    folder: Path
    work_dir: Path
    quick: bool
    rounds: int
    reference: Path | None

    def run(self, job: str, **arguments: Any) -> dict[str, Any]:
        """Run one job in a process of its own, on one thread."""
        return run_job(SCRIPT, job, arguments, threads=1).result

    @cached_property
    def trained(self) -> dict[str, Any]:
        """The directions of the model that is trained, saved, and its number of parameters."""
        folder = str(self.folder / "trained")
        return {"subspace": folder, **self.run("prepare", quick=self.quick, folder=folder)}

    @cached_property
    def model(self) -> str:
        """How rows call the model that is trained."""
        return f"Llama of {self.trained['parameters'] / 1e9:.3f} B"

    @cached_property
    def pair(self) -> dict[str, Any]:
        """The checkpoints of `harden.py` that are small enough for float64 SVDs."""
        name = "quick-exact" if self.quick else "llama-exact"
        arguments = {"size_name": name, "spectrum": "signal", "seed": 0}
        arguments["output"] = str(self.work_dir / f"{name}-signal")
        return run_job("checkpoints.py", "pair", arguments, threads=1).result

    def compare(self, **arguments: Any) -> dict[str, Any]:
        """Train in turn with and without the callback."""
        return self.run("compare", quick=self.quick, subspace=self.trained["subspace"], **arguments)


def overhead(bench: Bench) -> Iterator[Row]:
    """Judge what readings cost: from single readings and steps, and from whole runs."""
    found = bench.compare(rounds=1, steps=4 if bench.quick else 10, every=2, batch=BATCH)
    steps = [seconds for run in found["plain"] for seconds in run["steps_s"]]
    hooks = [seconds for run in found["ours"] for seconds in run["hooks_s"]["step"]]
    step, reading, idle = statistics.median(steps), statistics.median(hooks[1::2]), statistics.median(hooks[::2])
    share = (reading + (EVERY - 1) * idle) / (EVERY * step)
    once = [found["ours"][0]["hooks_s"][name][0] for name in ("begin", "end")]
    yield Row(
        f"{bench.model}, batch {BATCH[0]} x {BATCH[1]} tokens: a reading every {EVERY} steps, CPU-seconds of training",
        f"at most {MOST_SHARE:.0%}",
        f"{share:.3%} (reading {reading:.3f} s, {len(hooks[1::2])} of them; step {step:.2f} s, {len(steps)} of them; "
        f"once a run {once[0]:.2f} s at its begin and {once[1]:.2f} s at its end)",
        share <= MOST_SHARE,
        details=found,
    )
    yield _whole_runs(bench, step)
    yield Row(
        "  weights afterwards, with and without",
        "equal to the bit",
        "equal" if found["equal"] else "not equal",
        found["equal"],
        correctness=True,
    )


def _whole_runs(bench: Bench, step: float) -> Row:
    """Take the cost of a reading from whole runs that read at every step, as a check on the timed hooks."""
    count = 4 if bench.quick else 20
    found = bench.compare(rounds=bench.rounds, steps=count, every=1, batch=SHORT_BATCH)
    ours, plain = ([run["total_s"] for run in found[side]] for side in ("ours", "plain"))
    hooks = [sum(sum(times) for times in run["hooks_s"].values()) for run in found["ours"]]
    pairs = [one - other for one, other in zip(ours, plain, strict=True)]
    more = statistics.median(pairs)
    share = more / (count + 1) / (EVERY * step)  # all of it, begin and end too, counted as readings
    return Row(
        f"  the same from whole runs, {bench.rounds} of each side in turn, a reading at each of {count} steps "
        f"({SHORT_BATCH[0]} x {SHORT_BATCH[1]} tokens)",
        f"at most {MOST_SHARE:.0%}",
        f"{share:.3%} ({statistics.median(ours):.2f} against {statistics.median(plain):.2f} s; pairs "
        f"{min(pairs):.2f} to {max(pairs):.2f} s apart, the callback's hooks sum to {statistics.median(hooks):.2f} s)",
        share <= MOST_SHARE,
        details=found,
    )


def memory(bench: Bench) -> Iterator[Row]:
    """Judge what is held and what is resident with the callback beyond what is without it."""
    sides: dict[str, list[Child]] = {"plain": [], "ours": []}
    os.environ.update(TIGHT)
    for _ in range(1 if bench.quick else 3):
        for side, subspace in {"plain": None, "ours": bench.trained["subspace"]}.items():
            arguments = {"quick": bench.quick, "subspace": subspace, "steps": 2}
            sides[side].append(run_job(SCRIPT, "memory", arguments, threads=1, sample=True))
    for name in TIGHT:
        del os.environ[name]
    plain, ours = ([child.result for child in sides[side]] for side in sides)
    factors = ours[0]["factor_bytes"]
    held = ours[0]["storage_bytes"] - plain[0]["storage_bytes"]
    yield Row(
        f"{bench.model}, r=6: storages of tensors held with the callback",
        f"U, S, Vh and base coordinates, {factors:,} bytes",
        f"{held:,} bytes more, {held - factors:,} beyond the factors",
        held == factors,
        correctness=True,
        details={"plain": plain, "ours": ours},
    )
    resident = _more([run["anonymous_bytes"] for run in ours], [run["anonymous_bytes"] for run in plain])
    peak = _more(*([_peak(child) for child in sides[side]] for side in ("ours", "plain")))
    yield Row(
        f"  anonymous memory of the process after a reading, medians of {len(ours)} runs of each side",
        f"at most {factors / MIB:.1f} MiB more",
        f"{resident / MIB:.1f} MiB more (of {plain[0]['anonymous_bytes'] / MIB:.0f}); its peak in training "
        f"{peak / MIB:.1f} MiB more",
        resident <= factors,
    )


def _peak(child: Child) -> int:
    return child.peak_between(child.result["started_s"], child.result["ended_s"])


def _more(ours: list[int], plain: list[int]) -> float:
    return statistics.median(ours) - statistics.median(plain)


def erased(bench: Bench) -> Iterator[Row]:
    """Judge retention of models whose safety component was erased by hand."""
    coarse = bench.run("coarse_pair", folder=str(bench.folder / "coarse"))
    for dtype, pair, what in (
        ("float32", bench.pair, "the paper's range of R_align"),
        ("bfloat16", coarse, "an alignment above bfloat16's steps"),
    ):
        found = bench.run("erased", pair=pair, dtype=dtype)["readings"]
        error = max(abs(row["retention"] - row["left"]) for row in found)
        worst = max(row["worst_matrix"] for row in found)
        shares = ", ".join(f"{1 - row['left']:.0%}" for row in found)
        yield Row(
            f"{shares} of the safety component erased, {dtype} weights, {what}: retention against the share left",
            f"{KNOWN_SHARE:.0e}",
            f"{error:.1e}; the worst of {found[0]['matrices']} matrices {worst:.1e}",
            error <= KNOWN_SHARE,
            correctness=True,
            details={"readings": found},
        )
    found = bench.run("erased", pair=bench.pair, dtype="bfloat16")["readings"]
    error = max(abs(row["retention"] - row["of_these_weights"]) for row in found)
    stand = ", ".join(f"{row['of_these_weights']:.3f} for {row['left']:.1f}" for row in found)
    yield Row(
        "  bfloat16 weights, the paper's range of R_align: retention against that of the rounded weights in float64",
        f"{KNOWN_SHARE:.0e}",
        f"{error:.1e} (rounding itself undoes the erasure in part: {stand})",
        error <= KNOWN_SHARE,
        correctness=True,
        details={"readings": found},
    )


def r_metrics(bench: Bench) -> Iterator[Row]:
    """Judge R_ft and R_align."""
    reference = str(bench.reference.resolve()) if bench.reference else None
    folder = str(bench.folder / "r-metrics")
    found = bench.run("r_metrics", pair=bench.pair, folder=folder, reference=reference)["rows"]
    sides = {"definition": "the definition in float64", "reference": "the reference's unmodified R_metrics.py"}
    ranks = sorted({f"r={row['r']}" for row in found})
    models = len({row["model"] for row in found})
    least = min(abs(row["ours"]["r_align"] - row["ours"]["r_ft"]) for row in found)
    for side, what in sides.items():
        if side not in found[0]:
            continue
        error = max(abs(row["ours"][name] - row[side][name]) for row in found for name in ("r_ft", "r_align"))
        yield Row(
            f"R_ft and R_align of {models} fine-tuned models, each at {' and '.join(ranks)}, against {what}",
            f"{SAME_METRIC:.0e}",
            f"{error:.1e} (R_ft and R_align are at least {least:.2f} apart)",
            error <= SAME_METRIC,
            correctness=True,
            details={"rows": found},
        )


def processes(bench: Bench) -> Iterator[Row]:
    """Judge readings of models spread over two processes."""
    subspace = str(bench.folder / "directions")
    bench.run("directions", pair=bench.pair, folder=subspace)
    for backend in ("FSDP2", "ZeRO 3"):
        folder = bench.folder / backend.replace(" ", "")
        folder.mkdir()
        arguments = {"pair": bench.pair, "subspace": subspace, "folder": str(folder)}
        spread = run_job(SCRIPT, "spread", {**arguments, "backend": backend}, threads=1, processes=2)
        kinds = spread.result["kinds"]
        found = bench.run("alone", **arguments)
        error = max(found["retention"], found["r_metrics"])
        yield Row(
            f"2-process {backend}, readings of a training with and without a base, against one process on the same "
            "weights",
            f"{SAME_READING:.0e}",
            f"{error:.1e}, the worst of {found['matrices']} matrices (retention {found['retention']:.1e}, R_ft and "
            f"R_align {found['r_metrics']:.1e}; held as {', '.join(kinds)}; retention goes from {found['begin']:.4f} "
            f"to {found['end']:.4f})",
            error <= SAME_READING,
            correctness=True,
            details={"kinds": kinds, **found},
        )


ROWS: dict[str, Callable[[Bench], Iterable[Row]]] = {
    "overhead": overhead,
    "memory": memory,
    "erased": erased,
    "r-metrics": r_metrics,
    "processes": processes,
}


def main() -> int:
    """Run the chosen rows, print the table, write the JSON."""
    options = _parse()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    started = time.time()
    with tempfile.TemporaryDirectory(dir=options.work_dir) as folder:
        rounds = 1 if options.quick else options.rounds
        bench = Bench(Path(folder), options.work_dir, options.quick, rounds, options.reference)
        results = collect(row for name in options.only for row in ROWS[name](bench))
    target = options.json or options.work_dir / ("callback-quick.json" if options.quick else "callback.json")
    return publish(results, target, vars(options), started, options.quick)


def _parse() -> argparse.Namespace:
    cache = Path(os.environ.get("TMPDIR", "~/.cache")).expanduser() / "lox-hf-benchmarks"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--quick", action="store_true", help="small sizes; judge correctness only")
    parser.add_argument("--rounds", type=int, default=3, help="whole runs of each side (default: %(default)s)")
    parser.add_argument("--reference", type=Path, help="checkout of github.com/VITA-Group/LoX, to run its script")
    parser.add_argument("--work-dir", type=Path, default=cache, help="pairs are kept here (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where the record goes (default: into the work dir)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
