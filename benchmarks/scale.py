"""Measure what lox_hf promises beyond one process: many processes, models in pieces, sizes, accelerators; in one run.

    python benchmarks/scale.py                  # about 20 minutes on 2 idle cores, 35 GB of disk, 16 GB of memory
    python benchmarks/scale.py --quick          # small sizes, about a minute; only correctness is judged
    python benchmarks/scale.py --device cuda    # the accelerator alone, in under 8 minutes

Prints a table and writes JSON. The exit code is 1 when a judged figure misses its target.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import scale_rows
from rows import Bench
from scale_device_rows import on_device
from table import Row, collect, publish

ROWS: dict[str, Callable[[Bench], Iterable[Row]]] = {
    "processes": scale_rows.processes,
    "sharded": scale_rows.sharded,
    "sizes": scale_rows.sizes,
}
DEVICE = "device"


def main() -> int:
    """Run the chosen rows, print the table, write the JSON."""
    options = _parse()
    work_dir = options.work_dir.expanduser().resolve()
    bench = Bench(
        work_dir=work_dir,
        quick=options.quick,
        spectrum="signal",
        wall_threads=1,
        cpu_threads=1,
        repeats=1 if options.quick else options.repeats,
    )
    work_dir.mkdir(parents=True, exist_ok=True)
    started, settings = time.time(), vars(options) | {"load_average_before": os.getloadavg()[0]}
    results = collect(_measure(bench, options))
    shutil.rmtree(work_dir / "outputs", ignore_errors=True)
    target = options.json or work_dir / ("scale-quick.json" if options.quick else "scale.json")
    return publish(results, target, settings, started, options.quick)


def _parse() -> argparse.Namespace:
    cache = Path(os.environ.get("TMPDIR", "~/.cache")) / "lox-hf-benchmarks"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes; judge correctness only")
    parser.add_argument("--work-dir", type=Path, default=cache, help="pairs are kept here (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where the record goes (default: into the work dir)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours per figure, median taken (default: 3)")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, DEVICE], help="only these (default: all)")
    parser.add_argument(
        "--device",
        choices=("auto", "cuda", "xpu", "mps", "cpu"),
        default="auto",
        help="accelerator of the device rows; one that is named is measured alone, cpu with --quick (default: auto)",
    )
    options = parser.parse_args()
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu only shows that the device rows run: add --quick")
    options.rows = options.rows or ([*ROWS, DEVICE] if options.device in ("auto", "cpu") else [DEVICE])
    return options


def _measure(bench: Bench, options: argparse.Namespace) -> Iterator[Row]:
    """Yield every row as soon as it is measured."""
    for name in options.rows:
        yield from on_device(bench, options.device) if name == DEVICE else ROWS[name](bench)


if __name__ == "__main__":
    sys.exit(main())
