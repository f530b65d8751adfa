"""A resumed run reads, counts, logs and corrects as one that was never interrupted."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import TrainerCallback

from lox_hf import LoxCallback, LoxConfig, SafetySubspace
from lox_hf.errors import CheckpointError
from training.callback_runs import lines, make_base, make_subspace, make_trainer, moments, own_rows, retentions, run

SAVING = {"save_strategy": "steps", "save_steps": 2}
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def subspace() -> SafetySubspace:
    return make_subspace()


class Dies(TrainerCallback):
    """Ends a training as a kill would, after the readings of a step and its save."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def interrupted(folder: Path, callback: LoxCallback, step: int, **changes: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(folder, callback, callbacks=[callback, Dies(step)], **changes)


def same_readings(left: LoxCallback, right: LoxCallback) -> None:
    assert moments(left) == moments(right)
    assert retentions(left) == pytest.approx(retentions(right), abs=1e-7)
    for name in ("reapplied", "retention_after", "tripped", "epoch"):
        wanted = [getattr(reading, name) for reading in right.readings]
        assert [getattr(reading, name) for reading in left.readings] == pytest.approx(wanted, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("action", ["log", "reapply"])
def test_readings_are_those_of_an_uninterrupted_run(
    action: str, lora: Any, restore: bool, subspace: SafetySubspace, tmp_path: Path
) -> None:
    changes = {**SAVING, "restore_callback_states_from_checkpoint": restore}
    if lora is not None:
        changes |= {"with_peft_config": lora, "learning_rate": 2e-2}
    limit = {"below": 0.95} if action == "reapply" else {}

    def make() -> LoxCallback:
        return LoxCallback(subspace, action, every_n_steps=1, **limit)

    whole = make()
    uninterrupted = run(tmp_path / "whole", whole, **changes)
    assert action == "log" or sum(reading.reapplied > 0 for reading in whole.readings) > 2
    folder = tmp_path / "part"
    interrupted(folder, make(), step=5, **changes)
    assert lines(folder)[-1]["step"] == 5, "one reading beyond the checkpoint"
    resumed = make()
    trainer = run(folder, resumed, resume=True, **changes)
    same_readings(resumed, whole)
    assert [line["step"] for line in lines(folder)] == [reading.step for reading in whole.readings]
    wanted = [row["lox/retention"] for row in own_rows(uninterrupted)]
    assert [row["lox/retention"] for row in own_rows(trainer)] == pytest.approx(wanted, abs=1e-7)


def test_the_control_a_fresh_run_differs_from_a_resumed_one(subspace: SafetySubspace, tmp_path: Path) -> None:
    interrupted(tmp_path, LoxCallback(subspace, every_n_steps=1), step=3, **SAVING)
    fresh = LoxCallback(subspace, every_n_steps=1)
    run(tmp_path, fresh, max_steps=2)
    assert moments(fresh) == [(0, "begin"), (1, "step"), (2, "end")]
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize("cut", [0, 1, 200])
def test_a_kill_in_the_middle_of_a_line(cut: int, subspace: SafetySubspace, tmp_path: Path) -> None:
    whole = LoxCallback(subspace, every_n_steps=1)
    run(tmp_path / "whole", whole)
    folder = tmp_path / "part"
    interrupted(folder, LoxCallback(subspace, every_n_steps=1), step=3, **SAVING)
    path = folder / "lox" / "readings.jsonl"
    path.write_bytes(path.read_bytes()[: -cut or None])
    resumed = LoxCallback(subspace, every_n_steps=1)
    run(folder, resumed, resume=True, **SAVING)
    same_readings(resumed, whole)


@pytest.mark.parametrize("patience", [2, 3])
def test_patience_goes_on_where_it_was(patience: int, subspace: SafetySubspace, tmp_path: Path) -> None:
    """Retention falls below 1 at the first step, so that each reading is one more of the row."""

    def make() -> LoxCallback:
        return LoxCallback(subspace, "stop", below=0.93, patience=patience, every_n_steps=1)

    with pytest.warns(UserWarning, match="stops the training"):
        whole = make()
        wanted = run(tmp_path / "whole", whole, **SAVING).state.global_step
    assert wanted == 1 + patience
    folder = tmp_path / "part"
    interrupted(folder, make(), step=2, **SAVING)
    resumed = make()
    with pytest.warns(UserWarning, match="stops the training"):
        assert run(folder, resumed, resume=True, **SAVING).state.global_step == wanted
    same_readings(resumed, whole)


def test_a_run_that_stopped_can_be_resumed_without_its_limit(subspace: SafetySubspace, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="stops the training at step 2"):
        run(tmp_path, LoxCallback(subspace, "stop", below=0.93, every_n_steps=1))
    whole, resumed = LoxCallback(subspace, every_n_steps=1), LoxCallback(subspace, every_n_steps=1)
    run(tmp_path / "whole", whole)
    for restore in (True, False):
        run(tmp_path, resumed, resume=tmp_path / "checkpoint-2", restore_callback_states_from_checkpoint=restore)
        assert retentions(resumed) == pytest.approx(retentions(whole), abs=1e-7)


def test_a_finished_run_goes_on_for_longer(subspace: SafetySubspace, tmp_path: Path) -> None:
    run(tmp_path, LoxCallback(subspace, "reapply", every_n_steps=1), max_steps=4, **SAVING)
    longer = LoxCallback(subspace, "reapply", every_n_steps=1)
    run(tmp_path, longer, resume=True, max_steps=6, **SAVING)
    assert [reading.step for reading in longer.readings] == list(range(7))
    assert [bool(reading.reapplied) for reading in longer.readings] == [False] * 4 + [True, False, True]
    assert longer.readings[-1].retention_after == pytest.approx(1, abs=1e-5)


def test_resuming_a_finished_run_reads_nothing_anew(subspace: SafetySubspace, tmp_path: Path) -> None:
    first, again = (LoxCallback(subspace, "reapply", every_n_steps=2) for _ in range(2))
    run(tmp_path, first, **SAVING)
    run(tmp_path, again, resume=True, **SAVING)
    same_readings(again, first)


def test_directions_found_at_the_start_are_read_back(tmp_path: Path) -> None:
    make_base().save_pretrained(tmp_path / "base")
    config = LoxConfig(base_model_name_or_path=str(tmp_path / "base"), r=2, target_modules="all-linear")
    whole = LoxCallback(config, every_n_steps=1)
    run(tmp_path / "whole", whole)
    folder = tmp_path / "part"
    interrupted(folder, LoxCallback(config, every_n_steps=1), step=3, **SAVING)
    shutil.rmtree(tmp_path / "base")  # it is not needed any more
    resumed = LoxCallback(config, every_n_steps=1)
    run(folder, resumed, resume=True, **SAVING)
    same_readings(resumed, whole)


def test_start_coordinates_are_read_back_and_missing_ones_are_said(subspace: SafetySubspace, tmp_path: Path) -> None:
    interrupted(tmp_path, LoxCallback(subspace, "reapply", every_n_steps=1), step=3, **SAVING)
    resumed = LoxCallback(subspace, "reapply", every_n_steps=1)
    run(tmp_path, resumed, resume=tmp_path / "checkpoint-2", **SAVING)
    assert resumed.readings[-1].retention_after == pytest.approx(1, abs=1e-5)
    (tmp_path / "lox" / "start.safetensors").unlink()
    trainer = make_trainer(tmp_path, callbacks=[LoxCallback(subspace, "reapply")], **SAVING)
    with pytest.raises(CheckpointError, match="Pass strength"):
        trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    given = LoxCallback(subspace, "reapply", strength=1.0)
    run(tmp_path, given, resume=tmp_path / "checkpoint-2", **SAVING)
    assert given.readings[-1].retention_after == pytest.approx(1, abs=1e-5)


def test_a_callback_that_joins_at_a_resume_reads_from_there(subspace: SafetySubspace, tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=2, **SAVING).train()
    callback = LoxCallback(subspace, every_n_steps=2)
    run(tmp_path, callback, resume=True, **SAVING)
    assert moments(callback) == [(4, "step"), (6, "end")]


def test_safe_checkpoints_of_before_the_resume_are_named(subspace: SafetySubspace, tmp_path: Path) -> None:
    interrupted(tmp_path, LoxCallback(subspace, "stop", below=0.87, every_n_steps=2), step=3, **SAVING)
    resumed = LoxCallback(subspace, "stop", below=0.87, every_n_steps=2)
    with pytest.warns(UserWarning, match=r"The last safe checkpoint is .*checkpoint-2\."):
        run(tmp_path, resumed, resume=True, **SAVING)
    assert resumed.last_safe_checkpoint == tmp_path / "checkpoint-2"
