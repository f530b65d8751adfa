"""Kill the stress test of the demonstration at random moments, let it go on, and compare with an undisturbed run.

    python benchmarks/stress_kills.py                          # five seeds: about 10 minutes on 2 cores
    python benchmarks/stress_kills.py --seeds 2 --kills 1      # small

Prints a table and writes JSON. The exit code is 1 when the two differ. Pairs are trained once and kept.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from measure import ChildError
from table import Row, collect, publish

STRESS = "stress"
MADE = ("prepared", "before", "cells")
REPORTS = ("results.json", "report.md")


def main() -> int:
    """Run both sides, print the table, write the JSON."""
    options = _parse()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    started = time.time()
    results = collect(killed_runs(options))
    target = options.json or options.work_dir / "stress_kills.json"
    return publish(results, target, vars(options), started, quick=False)


def _parse() -> argparse.Namespace:
    cache = Path(os.environ.get("TMPDIR", "~/.cache")).expanduser() / "lox-hf-benchmarks"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="5", help="as lox-hf demo takes them (default: %(default)s)")
    parser.add_argument("--attacks", default="default", help="as lox-hf demo takes them (default: %(default)s)")
    parser.add_argument("--controls", default="random", help="as lox-hf demo takes them (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=2, help="how often it is killed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: %(default)s)")
    parser.add_argument("--work-dir", type=Path, default=cache, help="runs and pairs go here (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where the record goes (default: into the work dir)")
    return parser.parse_args()


def killed_runs(options: argparse.Namespace) -> Iterator[Row]:
    """Run once undisturbed, then with kills, and compare what the runs leave.

    The moments are numbers of finished pieces on disk (directions, trained controls, models measured, attacks), drawn
    over the whole run: every kill hits the work. Workers are killed with their parent, or end by themselves.
    """
    whole, killed = options.work_dir / "stress-whole", options.work_dir / "stress-killed"
    for folder in (whole, killed):
        shutil.rmtree(folder, ignore_errors=True)
    command = _command(options)
    started = time.monotonic()
    _run(command, whole)
    seconds, total = time.monotonic() - started, _made(whole)
    moments = sorted(random.Random(options.seed).sample(range(1, total - 1), options.kills))
    found = [_run(command, killed, moment) for moment in moments]
    _run(command, killed)
    what = f"lox-hf demo, seeds {options.seeds}, attacks {options.attacks}, controls {options.controls}"
    yield Row(f"{what}, undisturbed", "-", f"{total} pieces in {seconds:.0f} s, with pairs that were missing", None)
    same = [name for name in REPORTS if _content(whole, name) == _content(killed, name)]
    pieces = _pieces(whole) == _pieces(killed)
    hit = found == sorted(set(found)) and found[-1] < total
    yield Row(
        f"{what}, SIGKILL at {options.kills} random moments ({', '.join(map(str, found))} of {total} pieces on disk "
        "then), then to its end",
        "the files of an undisturbed run",
        f"{' and '.join(same) or 'no report'} equal to the byte; every piece equal: {'yes' if pieces else 'no'}",
        len(same) == len(REPORTS) and pieces and hit,
        correctness=True,
        details={"on_disk_at_kill": found, "total": total},
    )


def _command(options: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "lox_hf.cli", "demo", "--seeds", options.seeds, "--attacks", options.attacks]
    return [*command, "--controls", options.controls, "--cache", str(options.work_dir / "stress-pairs"), "--json"]


def _run(command: list[str], output: Path, kill_at: int | None = None) -> int:
    """Run to the end, or kill as soon as so many pieces are on disk; return how many there are."""
    # Workers may have passed the moment already: one more piece at least, so that work is hit.
    moment = None if kill_at is None else max(kill_at, _made(output) + 1)
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore:resource_tracker"}  # it tells of what a killed run left open
    process = subprocess.Popen([*command, "--output", str(output)], stdout=subprocess.DEVNULL, env=quiet)
    while process.poll() is None and (moment is None or _made(output) < moment):
        time.sleep(0.02)
    if kill_at is not None:
        process.kill()
    if process.wait() != (0 if kill_at is None else -signal.SIGKILL):
        raise ChildError(f"{' '.join(command)}\nended with exit code {process.returncode}")
    return _made(output)


def _pieces(output: Path) -> dict[str, bytes]:
    folder = output / STRESS
    found = [path for name in MADE for path in (folder / name).rglob("*.json")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if not path.name.startswith(".")}


def _made(output: Path) -> int:
    # Not their content: it is asked for many times a second.
    return sum(1 for name in MADE for path in (output / STRESS / name).rglob("*.json") if path.name[0] != ".")


def _content(output: Path, name: str) -> bytes:
    path = output / STRESS / name
    return path.read_bytes() if path.exists() else b""


if __name__ == "__main__":
    sys.exit(main())
