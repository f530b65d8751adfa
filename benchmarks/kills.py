"""`lox-hf asr` killed at random moments: the report of a run that goes on, against that of an undisturbed one."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from measure import ChildError
from table import Row

KILLS = 5


def killed_runs(work_dir: Path, model: Path, prompts: Path, seed: int = 0) -> Iterator[Row]:
    """Run once undisturbed, then with five SIGKILLs, and compare everything that a run leaves.

    Args:
        work_dir: Where the runs go.
        model: Checkpoint that answers.
        prompts: File of prompts.
        seed: Seed of the moments.
    """
    whole, killed = work_dir / "run-whole", work_dir / "run-killed"
    for folder in (whole, killed):
        shutil.rmtree(folder, ignore_errors=True)
    work_s = _run(_command(model, prompts, whole), whole)
    rng = random.Random(seed)
    moments = [_run(_command(model, prompts, killed), killed, rng.uniform(0, work_s / 2)) for _ in range(KILLS)]
    _run(_command(model, prompts, killed), killed)
    same = [name for name in ("report.json", "report.md") if _text(whole / name) == _text(killed / name)]
    once = all(_positions(folder) for folder in (whole, killed))
    yield Row(
        f"lox-hf asr, SIGKILL at {KILLS} random moments ({_listed(moments)} answers on disk then), then to its end",
        "report of an undisturbed run",
        f"{' and '.join(same) or 'no file'} equal; every answer once: {'yes' if once else 'no'}",
        len(same) == 2 and once,
        correctness=True,
        details={"answers_at_kill": moments, "work_s": work_s},
    )


def _command(model: Path, prompts: Path, output: Path) -> list[str]:
    command = [sys.executable, "-m", "lox_hf.cli", "asr", str(model), "--prompts", str(prompts)]
    return [*command, "--output", str(output), "--batch-size", "16", "--json"]


def _run(command: list[str], output: Path, kill_after_s: float | None = None) -> float:
    """Run, and return the seconds from its first file to its end; or kill it then, and return its answers on disk."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (output / "run.json").exists() and process.poll() is None:
        time.sleep(0.01)
    started = time.perf_counter()
    if kill_after_s is None:
        if process.wait():
            raise ChildError(f"{' '.join(command)}\nended with exit code {process.returncode}")
        return time.perf_counter() - started
    time.sleep(kill_after_s)
    process.kill()
    process.wait()
    return len(_lines(output / "generations.jsonl"))


def _positions(folder: Path) -> bool:
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


def _listed(numbers: list[float]) -> str:
    return ", ".join(f"{number:.0f}" for number in numbers)
