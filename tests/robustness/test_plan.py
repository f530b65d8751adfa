"""The plan of a stress test: what it would do, how long and how large it would be, with nothing written."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lox_hf.config import LoxConfig
from lox_hf.records import StressPlan
from lox_hf.robustness.plan import plan_stress
from lox_hf.robustness.stress import stress_test
from robustness.tiny_pair import HARDENED, attack, config, make_model, save_pair, without_figures, write_rows
from test_bad_input import nothing_lost


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    save_pair(folder)
    return write_rows(folder)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def planned(pair: Path, **changes: Any) -> StressPlan:
    with nothing_lost(pair), nothing_lost(Path.cwd()):
        return plan_stress(config(pair, **changes), estimate=False)


def test_the_plan_says_what_is_run(pair: Path, tmp_path: Path) -> None:
    settings = {"learning_rates": [1e-3, 3e-3], "seeds": [0, 1], "scan_seeds": 1, "controls": ["random"]}
    plan = planned(pair, **settings)
    with without_figures():
        report = stress_test(config(pair, **settings), tmp_path / "run")
    assert (plan.cells, plan.seeds, plan.scanning_seeds) == (len(report.cells), report.seeds, (0,))
    assert list(plan.models) == list(dict.fromkeys(cell.model for cell in report.cells))
    (found,), cell = plan.attacks, report.cells[0]
    assert (found.name, found.steps, found.learning_rates) == (cell.attack, cell.steps, (1e-3, 3e-3))
    assert (0, *found.readings) == tuple(reading.step for reading in cell.readings)
    assert (found.rows, found.held_out) == (18, cell.task_after.accuracy.n)
    assert (plan.harmful, plan.harmless) == (cell.readings[0].asr.n, cell.readings[0].over_refusal.n)
    assert plan.not_run == report.not_run
    assert StressPlan.from_json(plan.to_json()).attacks == plan.attacks


@pytest.mark.parametrize(
    ("changes", "cells"),
    [
        ({}, 2),
        ({"hardened": [HARDENED, LoxConfig(r=1)]}, 3),
        ({"learning_rates": [1e-3, 2e-3], "seeds": [0, 1, 2]}, 2 * 2 * 3),
        ({"learning_rates": [1e-3, 2e-3], "seeds": [0, 1, 2], "scan_seeds": 2}, 2 * (2 * 2 + 1)),
        ({"seeds": [0, 1], "scan_seeds": 5}, 2 * 2),
    ],
)
def test_runs_are_counted(changes: dict[str, Any], cells: int, pair: Path) -> None:
    assert planned(pair, **changes).cells == cells
    twice = planned(pair, **changes, attacks=[attack(pair), attack(pair, "few", n=4)])
    assert twice.cells == 2 * cells


def test_memory_is_that_of_what_is_trained(pair: Path) -> None:
    weights = sum(weight.numel() for weight in make_model().parameters())
    assert planned(pair).memory_bytes == 4 * 4 * weights  # float32: weights, gradients, two moments
    assert planned(pair, dtype="bfloat16").memory_bytes == 4 * 2 * weights
    assert planned(pair, lora={"r": 1, "target_modules": ["q_proj"]}).memory_bytes == 4 * weights


def test_time_is_measured_on_a_few_steps_and_answers(pair: Path) -> None:
    assert math.isnan(planned(pair).seconds)
    state = torch.random.get_rng_state()
    with nothing_lost(pair), nothing_lost(Path.cwd()):
        one = plan_stress(config(pair))
        many = plan_stress(config(pair, seeds=list(range(200))))
    assert 0 < one.seconds < 600
    assert many.cells == 200 * one.cells and many.seconds > 10 * one.seconds
    assert torch.equal(torch.random.get_rng_state(), state)
