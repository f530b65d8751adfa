"""A run that is killed and goes on ends as an undisturbed one, to the byte but for the seconds that hardening took."""

import json
import multiprocessing
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from auto import auto_pair
from lox_hf.auto.run import auto_harden
from test_bad_input import contents


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with auto_pair.made(tmp_path_factory.mktemp("pair")) as folder:
        yield folder


def begin(pair: Path, output: Path) -> None:
    """In a process of its own, which is killed."""
    torch.set_num_threads(1)
    auto_harden(auto_pair.config(pair), output, progressbar=False)


def made(output: Path) -> int:
    """Models that were measured so far, and whether one was hardened."""
    folders = ("choosing", "selection/points", "selection/attacked", "hardened", "reporting")
    return sum(len(list((output / name).glob("*.json"))) for name in folders)


def comparable(output: Path) -> dict[str, object]:
    """Every file, without how long hardening took and where it was written to."""
    files: dict[str, object] = dict(contents(output))
    for name in ("hardened/lox_report.json", "selection/subspace/lox_report.json"):
        report = json.loads((output / name).read_text())
        tensors = [{**tensor, "seconds": 0} for tensor in report["tensors"]]
        files[name] = {**report, "seconds": 0, "output": "", "tensors": tensors}
    name = "selection/subspace/lox_subspace.safetensors"  # safetensors writes its metadata in any order
    return files | {name: {tensor: found.tolist() for tensor, found in load_file(output / name).items()}}


def test_killed_at_random_moments_and_run_to_its_end(pair: Path, tmp_path: Path) -> None:
    begin(pair, tmp_path / "undisturbed")
    context = multiprocessing.get_context("forkserver")  # imports are made once, so that kills hit the work
    context.set_forkserver_preload(["lox_hf.auto.run", "trl", "datasets", "matplotlib.figure"])
    output, rng, total, found = tmp_path / "run", random.Random(0), made(tmp_path / "undisturbed"), []
    for _ in range(3):
        process = context.Process(target=begin, args=(pair, output))
        process.start()
        moment = made(output) + rng.randint(1, total // 4)
        while made(output) < moment and process.is_alive():
            time.sleep(0.002)
        process.kill()
        process.join()
        found.append(made(output))
    assert 0 < found[0] <= found[-1] < total, "kills fell into the work"
    begin(pair, output)
    assert comparable(output) == comparable(tmp_path / "undisturbed")
