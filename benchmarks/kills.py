"""`lox-hf asr` killed at random moments: the report of a run that goes on, against that of an undisturbed one."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import endpoint
from measure import ChildError
from table import Row

KILLS = 5


def killed_runs(work_dir: Path, model: Path, prompts: Path, seed: int = 0) -> Iterator[Row]:
    """Run once undisturbed, then with five SIGKILLs, and compare everything that a run leaves.

    The moments are numbers of answers and verdicts on disk, drawn over the whole run: every kill hits the work.

    Args:
        work_dir: Where the runs go.
        model: Checkpoint that answers.
        prompts: File of prompts.
        seed: Seed of the moments.
    """
    whole, killed = work_dir / "run-whole", work_dir / "run-killed"
    for folder in (whole, killed):
        shutil.rmtree(folder, ignore_errors=True)
    with endpoint.server({"latency_s": endpoint.LATENCY_S, "rates": {}, "seed": 0}) as judge:
        command = _command(model, prompts, judge["base_url"])
        _run(command, whole)
        total = _lines_on_disk(whole)
        moments = sorted(random.Random(seed).sample(range(1, total), KILLS))
        found = [_run(command, killed, moment) for moment in moments]
        _run(command, killed)
    same = [name for name in ("report.json", "report.md") if _text(whole / name) == _text(killed / name)]
    once = _every_position_once(whole) and _every_position_once(killed)
    hit = found == sorted(set(found)) and found[-1] < total
    yield Row(
        f"lox-hf asr with a rubric, SIGKILL at {KILLS} random moments ({_listed(found)} of {total} answers and "
        "verdicts on disk then), then to its end",
        "the report of an undisturbed run",
        f"{' and '.join(same) or 'no file'} equal; every answer and verdict once: {'yes' if once else 'no'}",
        len(same) == 2 and once and hit,
        correctness=True,
        details={"on_disk_at_kill": found, "total": total},
    )


def _command(model: Path, prompts: Path, judge_url: str) -> list[str]:
    command = [sys.executable, "-m", "lox_hf.cli", "asr", str(model), "--prompts", str(prompts), "--batch-size", "16"]
    return [*command, "--judge", "rubric:judge", "--judge-endpoint", judge_url, "--json"]


def _run(command: list[str], output: Path, kill_at: int | None = None) -> int:
    """Run to the end, or kill as soon as so many lines are on disk; return how many there are."""
    # A judge's batch may have passed the moment already: one more line at least, so that work is hit.
    moment = None if kill_at is None else max(kill_at, _lines_on_disk(output) + 1)
    process = subprocess.Popen([*command, "--output", str(output)], stdout=subprocess.DEVNULL)
    while process.poll() is None and (moment is None or _lines_on_disk(output) < moment):
        time.sleep(0.01)
    if kill_at is not None:
        process.kill()
    if process.wait() != (0 if kill_at is None else -signal.SIGKILL):
        raise ChildError(f"{' '.join(command)}\nended with exit code {process.returncode}")
    return _lines_on_disk(output)


def _lines_on_disk(output: Path) -> int:
    return sum(len(_lines(path)) for path in output.glob("*.jsonl"))


def _every_position_once(folder: Path) -> bool:
    """Whether every position is there once, in the answers and in the verdicts."""
    for path in folder.glob("*.jsonl"):
        positions = [json.loads(line)["position"] for line in _lines(path)]
        if sorted(positions) != list(range(len(positions))):
            return False
    return True


def _lines(path: Path) -> list[str]:
    return _text(path).splitlines()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
