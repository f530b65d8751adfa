"""A stress test that is killed and goes on ends as an undisturbed one, to the byte, and leaves no process behind."""

import multiprocessing
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lox_hf.cli.main import main
from robustness.tiny_pair import save_pair, without_figures, write_rows
from test_bad_input import contents


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with without_figures():
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    save_pair(folder)
    return write_rows(folder)


def words_of_everything(pair: Path, output: Path) -> list[str]:
    """A command with something of everything: learning rates, seeds that do not scan, a control that is trained."""
    words = {
        "--base-model": f"{pair}/base",
        "--attacks": f"custom:{pair}/attack.jsonl",
        "--hardened": "2:0.25",
        "--controls": "retrained",
        "--calibration-data": f"{pair}/calibration.jsonl",
        "--control-training": "learning_rate=1e-3 batch_size=4 retrain_steps=2",
        "--lrs": "3e-3 1e-3",
        "--seeds": "2",
        "--scan-seeds": "1",
        "--readings": "2",
        "--sft": "max_steps=3 per_device_train_batch_size=4 gradient_checkpointing=false",
        "--prompts": f"{pair}/prompts.jsonl",
        "--max-new-tokens": "14",
        "--device": "cpu",
        "--output": f"{output}",
    }
    given = (word for name, value in words.items() for word in (name, *value.split()))
    return ["stress", f"{pair}/aligned", *given, "--json"]


@pytest.fixture(scope="module")
def undisturbed(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(words_of_everything(pair, folder)) == 0
    return folder


def begin(pair: Path, output: Path) -> None:
    """In a process of its own, which is killed."""
    torch.set_num_threads(1)
    main(words_of_everything(pair, output))


def made(output: Path) -> int:
    return sum(len(list((output / name).rglob("*.json"))) for name in ("prepared", "before", "cells"))


def test_killed_at_random_moments_and_run_to_its_end(pair: Path, undisturbed: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")  # imports are made once, so that kills hit the work
    context.set_forkserver_preload(["lox_hf.robustness.stress", "lox_hf.cli", "trl", "datasets"])
    output, rng, total, found = tmp_path / "run", random.Random(0), made(undisturbed), []
    for _ in range(3):
        process = context.Process(target=begin, args=(pair, output))
        process.start()
        moment = made(output) + rng.randint(1, total // 5)
        while made(output) < moment and process.is_alive():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.join()
        found.append(made(output))
    assert found == sorted(set(found)) and found[-1] < total  # control: every kill hit the work
    assert not (output / "results.json").exists()
    assert main(words_of_everything(pair, output)) == 0
    assert contents(output) == contents(undisturbed)


def test_workers_die_with_a_killed_run_and_change_no_number(pair: Path, undisturbed: Path, tmp_path: Path) -> None:
    output, total = tmp_path / "run", made(undisturbed)
    words = [*words_of_everything(pair, output), "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-m", "lox_hf.cli", *words], cwd=Path(__file__).parents[2])
    moment = random.Random(1).randint(1, total // 2)
    while made(output) < moment and process.poll() is None:
        time.sleep(0.001)
    orphans = children(process.pid)
    process.kill()
    assert process.wait() == -signal.SIGKILL and moment <= made(output) < total
    assert len(orphans) >= 2  # control: they were there
    deadline = time.monotonic() + 30
    while any(map(is_running, orphans)):
        assert time.monotonic() < deadline, "orphans live on"
        time.sleep(0.01)
    assert main(words) == 0
    assert contents(output) == contents(undisturbed)


def children(process: int) -> list[int]:
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return [int(child) for child, parent in map(str.split, listed.splitlines()) if int(parent) == process]


def is_running(process: int) -> bool:
    """Whether a process does anything; one that has ended stays a zombie where nobody asks for it."""
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True, check=False)
    return bool(shown.stdout.strip()) and not shown.stdout.strip().startswith("Z")
