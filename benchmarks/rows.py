"""The rows of the table: what each one runs, and how it is judged."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from measure import Child, clear_output, evict, run_job, warm
from table import Row

MIB = 1 << 20


@dataclass
class Bench:
    """What every row needs: the sizes, the settings, and results that several rows share."""

    work_dir: Path
    quick: bool
    spectrum: str
    wall_threads: int
    cpu_threads: int
    repeats: int
    r: int = 6
    alpha: float = 1.25
    seed: int = 0

    @cached_property
    def small(self) -> dict[str, Any]:
        """Return the folders of the 0.37 B pair (or its stand-in under --quick)."""
        return self.pair("quick-small" if self.quick else "llama-0.37b", self.spectrum)

    @cached_property
    def large(self) -> dict[str, Any]:
        """Return the folders of the 1.27 B pair (or its stand-in under --quick)."""
        return self.pair("quick-large" if self.quick else "llama-1.27b", self.spectrum)

    @cached_property
    def small_strong(self) -> dict[str, Any]:
        """Return the folders of the 0.37 B pair (or its stand-in) with a strong signal."""
        return self.pair("quick-small" if self.quick else "llama-0.37b", "strong")

    @cached_property
    def large_strong(self) -> dict[str, Any]:
        """Return the folders of the 1.27 B pair (or its stand-in) with a strong signal."""
        return self.pair("quick-large" if self.quick else "llama-1.27b", "strong")

    @cached_property
    def exact(self) -> dict[str, Any]:
        """Return the folders of a pair small enough for float64 SVDs, always with a signal and so with a gap."""
        return self.pair("quick-exact" if self.quick else "llama-exact", "signal")

    @cached_property
    def small_runs(self) -> list[Child]:
        """Harden the small pair from disk to disk, sampled; the last output stays."""
        return self.warm_runs(self.small, "hardened-small")

    @cached_property
    def large_runs(self) -> list[Child]:
        """Harden the large pair from disk to disk, sampled, from a warm page cache."""
        return self.warm_runs(self.large, "hardened-large")

    def warm_runs(self, pair: dict[str, Any], name: str) -> list[Child]:
        """Harden a pair from disk to disk, sampled, from a warm page cache; the last output stays."""
        warm(folders(pair))
        return [self.harden(pair, name, self.cpu_threads) for _ in range(self.repeats)]

    def output(self, name: str) -> Path:
        """Return an output folder's path, emptied, with the disk at rest."""
        folder = self.work_dir / "outputs" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        clear_output(folder)
        return folder

    def arguments(self, pair: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments that every hardening job takes."""
        return {"aligned": pair["aligned"], "base": pair["base"], "r": self.r, "alpha": self.alpha}

    def harden(self, pair: dict[str, Any], name: str, threads: int, sample: bool = True) -> Child:
        """Run `harden_checkpoint` once in a process of its own."""
        arguments = self.arguments(pair) | {"output": str(self.output(name))}
        return run_job("jobs.py", "harden", arguments, threads, sample)

    def pair(self, size_name: str, spectrum: str) -> dict[str, Any]:
        """Return the folders of a pair, which is written where it is not there yet."""
        print(f"pair {size_name} ({spectrum})", file=sys.stderr)
        folder = self.work_dir / f"{size_name}-{spectrum}"
        arguments = {"size_name": size_name, "output": str(folder), "spectrum": spectrum, "seed": self.seed}
        return run_job("checkpoints.py", "pair", arguments, self.cpu_threads).result


def folders(pair: dict[str, Any]) -> list[Path]:
    """Return the two folders of a pair."""
    return [Path(pair["aligned"]), Path(pair["base"])]


def projector(bench: Bench) -> Iterator[Row]:
    """Judge the projectors of a decomposition against float64."""
    arguments = {"r": bench.r, "seed": bench.seed, "quick": bench.quick}
    result = run_job("accuracy.py", "projectors", arguments, bench.cpu_threads).result
    error = result["max_error"]
    figure = f"projector error against a float64 SVD, worst of {len(result['cases'])} matrices with a gap"
    yield Row(figure, "at most 1e-4", f"{error:.1e}", error <= 1e-4, correctness=True, details=result)


def entries(bench: Bench) -> Iterator[Row]:
    """Judge every stored entry of a hardened checkpoint against the exact result."""
    output = bench.output("hardened-exact")
    common = bench.arguments(bench.exact)
    run_job("jobs.py", "harden", common | {"output": str(output)}, bench.cpu_threads)
    result = run_job("accuracy.py", "entries", common | {"hardened": str(output)}, bench.cpu_threads).result
    met = result["differing_share"] <= 1e-3 and result["max_ulps"] <= 1
    figure = f"stored entries that differ from the exact result, of {result['entries'] / 1e6:.1f} M"
    yield Row(figure, "at most 1e-3, by one ulp", difference(result), met, correctness=True, details=result)


def cpu_small(bench: Bench) -> Iterator[Row]:
    """Compare CPU-seconds of whole processes with the reference flow; compare the two outputs as well."""
    output = bench.output("reference-small")
    arguments = bench.arguments(bench.small) | {"output": str(output)}
    theirs = run_job("reference.py", "harden", arguments, bench.cpu_threads, sample=True)
    strong = bench.warm_runs(bench.small_strong, "hardened-small-strong")
    for spectrum, runs in {bench.spectrum: bench.small_runs, "strong": strong}.items():
        ours = statistics.median(run.cpu_s for run in runs)
        ratio = theirs.cpu_s / ours
        details = {"ours": [cost(run) for run in runs], "reference": cost(theirs)}
        figure = f"{count(bench.small)} pair ({spectrum}), whole process, CPU-seconds, against the reference flow"
        measured = f"{ratio:.1f}x less ({ours:.2f} s against {theirs.cpu_s:.1f} s)"
        yield Row(figure, "at least 25x less", measured, ratio >= 25, details=details)
    yield Row(
        "  peak RSS and wall of the two",
        "information",
        f"{mib(max(run.peak_rss_bytes for run in bench.small_runs))} and "
        f"{statistics.median(run.wall_s for run in bench.small_runs):.1f} s, "
        f"against {mib(theirs.peak_rss_bytes)} and {theirs.wall_s:.1f} s",
        None,
    )
    both = {"first": str(output.with_name("hardened-small")), "second": str(output)}
    both["aligned"] = bench.small["aligned"]
    result = run_job("accuracy.py", "folders", both, bench.cpu_threads).result
    figure = "  entries that differ from the reference flow's output"
    yield Row(figure, "information", difference(result), None, details=result)
    clear_output(output)


def cpu_large(bench: Bench) -> Iterator[Row]:
    """Compare CPU-seconds of work with full SVDs: one timed per distinct shape, times the number of that shape."""
    imports = statistics.median(
        run_job("jobs.py", "imports", {}, bench.cpu_threads).cpu_s for _ in range(bench.repeats)
    )
    dense = run_job("reference.py", "svds", bench.arguments(bench.large), bench.cpu_threads).result
    strong = bench.warm_runs(bench.large_strong, "hardened-large")
    for spectrum, runs in {bench.spectrum: bench.large_runs, "strong": strong}.items():
        whole = statistics.median(run.cpu_s for run in runs)
        ratio = dense["total_cpu_s"] / (whole - imports)
        steps = max(run.result["max_steps"] for run in runs)
        figure = f"{count(bench.large)} in 7B layer shapes ({spectrum}), CPU-seconds of work, against full SVDs"
        measured = (
            f"{ratio:.0f}x less ({whole - imports:.2f} s, up to {steps} passes, against {dense['total_cpu_s']:.0f} s: "
            "one SVD a shape, times its count)"
        )
        details = {"ours": [cost(run) for run in runs], "import_cpu_s": imports, "dense": dense}
        yield Row(figure, "at least 150x less", measured, ratio >= 150, details=details)


def memory(bench: Bench) -> Iterator[Row]:
    """Judge peak anonymous memory, sampled, at both thread counts."""
    both_cores = bench.harden(bench.large, "hardened-large", bench.wall_threads)
    groups = {
        f"{count(bench.small)}, {bench.cpu_threads} thread": bench.small_runs,
        f"{count(bench.large)}, {bench.cpu_threads} thread": bench.large_runs,
        f"{count(bench.large)}, {bench.wall_threads} threads": [both_cores],
    }
    for name, runs in groups.items():
        peak = max(run.peak_anonymous_bytes for run in runs)
        rss = max(run.peak_rss_bytes for run in runs)
        figure = f"peak anonymous memory of harden_checkpoint, {name} (sampled every 5 ms)"
        measured = f"{mib(peak)} (RSS with mapped files {mib(rss)})"
        yield Row(figure, "at most 220 MiB", measured, peak <= 220 * MIB, details={"runs": [cost(r) for r in runs]})


def wall(bench: Bench) -> Iterator[Row]:
    """Compare wall time with a copy of the aligned folder plus a read of the base, both durable, A B A B.

    Under --quick the caches are left alone: dropping them slows the whole machine down.
    """
    for spectrum, pair in {bench.spectrum: bench.large, "strong": bench.large_strong}.items():
        yield _wall(bench, pair, spectrum, "warm", partial(warm, folders(pair)))
        if not bench.quick:
            yield _wall(bench, pair, spectrum, "cold", partial(evict, folders(pair)))


def _wall(bench: Bench, pair: dict[str, Any], spectrum: str, state: str, prepare: Callable[[], object]) -> Row:
    """Judge the call alone; a whole process also imports torch, which is shown beside it."""
    ours, processes, copies = [], [], []
    for _ in range(bench.repeats):
        copies.append(_copy(bench, pair, prepare, sync=True))
        _rest(bench, prepare)
        run = bench.harden(pair, "hardened-large", bench.wall_threads, sample=False)
        ours.append(run.result["call_s"])
        processes.append(run.wall_s)
    ratios = [mine / copy for mine, copy in zip(ours, copies, strict=True)]
    unsynced = _copy(bench, pair, prepare, sync=False)
    ratio = statistics.median(ratios)
    measured = (
        f"{ratio:.2f}x ({statistics.median(ours):.1f} s against {statistics.median(copies):.1f} s; "
        f"ratios {', '.join(f'{value:.2f}' for value in ratios)}; whole process {statistics.median(processes):.1f} s; "
        f"copy without fsync {unsynced:.1f} s)"
    )
    figure = f"{count(pair)} ({spectrum}), wall of harden_checkpoint, {bench.wall_threads} threads, {state} cache"
    details = {"ours_s": ours, "processes_s": processes, "copies_s": copies, "copy_without_fsync_s": unsynced}
    return Row(f"{figure}, against copy + read of base", "at most 1.2x", measured, ratio <= 1.2, details=details)


def apply_memory(bench: Bench) -> Iterator[Row]:
    """Judge what `apply_lox` needs beyond the model's own memory."""
    for pair in (bench.small,) if bench.quick else (bench.small, bench.large):
        arguments = bench.arguments(pair) | {"subspace": None}
        child = run_job("jobs.py", "apply", arguments, bench.cpu_threads, sample=True)
        result = child.result
        growth = child.peak_between(result["start_s"], result["end_s"]) - result["before_bytes"]
        limit = max(result["model_bytes"] // 10, 2 * result["largest_tensor_bytes"])
        figure = f"apply_lox on a loaded {count(pair)} model: anonymous memory beyond the model (sampled every 5 ms)"
        target = f"at most {mib(limit)} (10 % of the model or two largest tensors)"
        yield Row(figure, target, mib(growth), growth <= limit, details={"growth_bytes": growth, **result})


def new_alpha(bench: Bench) -> Iterator[Row]:
    """Compare a second alpha from a saved subspace with decomposing again, on a loaded model."""
    pair = bench.small
    subspace = bench.output("subspace")
    saving = {"aligned": pair["aligned"], "base": pair["base"], "output": str(subspace), "r": bench.r}
    saved = run_job("jobs.py", "subspace", saving, bench.cpu_threads).result
    common = {"aligned": pair["aligned"], "r": bench.r}
    first = [_apply(bench, common | {"base": pair["base"], "subspace": None}, 1.25) for _ in range(bench.repeats)]
    second = [_apply(bench, common | {"base": None, "subspace": str(subspace)}, 0.5) for _ in range(bench.repeats)]
    before, after = (statistics.median(run["cpu_s"] for run in runs) for runs in (first, second))
    details = {"decomposing": first, "from_subspace": second, **saved}
    figure = f"another alpha from a saved subspace, {count(pair)}: CPU-seconds of apply_lox against decomposing"
    measured = f"{after / before:.3f} ({after:.2f} s against {before:.2f} s)"
    yield Row(figure, "under 0.1", measured, after / before < 0.1, details=details)
    calls = max(run["decompositions"] for run in second)
    control = min(run["decompositions"] for run in first)
    measured = f"{calls} (report: {', '.join(second[0]['methods'])}; decomposing from the base: {control})"
    figure = "another alpha from a saved subspace: decompositions"
    yield Row(figure, "none", measured, calls == 0 and control > 0, correctness=True)
    clear_output(subspace)


def _apply(bench: Bench, arguments: dict[str, Any], alpha: float) -> dict[str, Any]:
    return run_job("jobs.py", "apply", arguments | {"alpha": alpha}, bench.cpu_threads).result


def _rest(bench: Bench, prepare: Callable[[], object]) -> None:
    """Bring the checkpoint files into the wanted cache state, and the libraries into the page cache."""
    for name in ("hardened-large", "copy"):
        bench.output(name)
    prepare()
    run_job("jobs.py", "imports", {}, bench.wall_threads)


def _copy(bench: Bench, pair: dict[str, Any], prepare: Callable[[], object], sync: bool) -> float:
    _rest(bench, prepare)
    output = bench.work_dir / "outputs" / "copy"
    arguments = {"aligned": pair["aligned"], "base": pair["base"], "output": str(output), "sync": sync}
    return run_job("reference.py", "copy", arguments, bench.wall_threads).result["call_s"]


def cost(child: Child) -> dict[str, Any]:
    """Return what a process cost, as plain data without the samples."""
    return {key: value for key, value in asdict(child).items() if key != "samples"}


def count(pair: dict[str, Any]) -> str:
    """Return the number of parameters of a pair, as a text."""
    parameters = pair["parameters"]
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:.1f} M"


def difference(result: dict[str, Any]) -> str:
    """Return how far two checkpoints are from each other, as a text."""
    share, ulps, near_zero = (result[key] for key in ("differing_share", "max_ulps", "neighbours_exceeded"))
    return f"{share:.1e}, at most {ulps:.2f} ulp ({near_zero} near zero by cancellation)"


def mib(size: int) -> str:
    """Return a number of bytes, as a text."""
    return f"{size / MIB:.0f} MiB"
