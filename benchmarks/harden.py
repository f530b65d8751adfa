"""Measure every figure that lox_hf promises about hardening, side by side with the reference's algorithm, in one run.

    python benchmarks/harden.py                # everything, about 20 minutes and 10 GB of disk
    python benchmarks/harden.py --quick        # small sizes, about a minute; only correctness is judged

Prints a table and writes JSON. The exit code is 1 when a judged figure misses its target.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import peers
import rows
from rows import Bench
from table import Row, collect, publish

ROWS: dict[str, Callable[[Bench], Iterable[Row]]] = {
    "projector": rows.projector,
    "entries": rows.entries,
    "cpu-small": rows.cpu_small,
    "cpu-large": rows.cpu_large,
    "memory": rows.memory,
    "wall": rows.wall,
    "apply-memory": rows.apply_memory,
    "new-alpha": rows.new_alpha,
    "mergekit": peers.mergekit,
}


def main() -> int:
    """Run the chosen rows, print the table, write the JSON."""
    options = _parse()
    work_dir = options.work_dir.expanduser().resolve()
    bench = Bench(
        work_dir=work_dir,
        quick=options.quick,
        spectrum=options.spectrum,
        wall_threads=options.threads,
        cpu_threads=options.cpu_threads,
        repeats=1 if options.quick else options.repeats,
    )
    work_dir.mkdir(parents=True, exist_ok=True)
    started = time.time()
    results = collect(_measure(bench, options))
    shutil.rmtree(work_dir / "outputs", ignore_errors=True)
    target = options.json or work_dir / ("harden-quick.json" if options.quick else "harden.json")
    return publish(results, target, vars(options), started, options.quick)


def _parse() -> argparse.Namespace:
    cache = Path(os.environ.get("TMPDIR", "~/.cache")) / "lox-hf-benchmarks"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes; judge correctness only")
    parser.add_argument("--work-dir", type=Path, default=cache, help="pairs are kept here (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where the record goes (default: into the work dir)")
    parser.add_argument("--threads", type=int, default=2, help="threads of the wall-time row (default: 2)")
    parser.add_argument("--cpu-threads", type=int, default=1, help="threads of both sides elsewhere (default: 1)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours per figure, median taken (default: 3)")
    parser.add_argument("--spectrum", choices=("signal", "noise"), default="signal", help="noise: the worst case")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="only these")
    parser.add_argument("--reference", type=Path, help="the reference's own LoX.py, to be timed as well")
    return parser.parse_args()


def _measure(bench: Bench, options: argparse.Namespace) -> Iterator[Row]:
    """Yield every row as soon as it is measured."""
    chosen = [ROWS[name] for name in options.rows if not (name == "mergekit" and bench.quick)]
    if options.reference is not None:
        chosen.append(partial(peers.reference_script, script=options.reference))
    for measure in chosen:
        yield from measure(bench)


if __name__ == "__main__":
    sys.exit(main())
