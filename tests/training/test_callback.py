"""`LoxCallback` in real trainings: when it reads, what it decides, and that the training is otherwise as it was."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import EarlyStoppingCallback, TrainerCallback

import zoo
from lox_hf import LoxCallback, LoxConfig, LoxError, PairingError, SafetyProbe, SafetySubspace, UnsupportedModelError
from lox_hf.errors import ConfigError
from lox_hf.training.monitor import DriftMonitor
from robustness.trainable import make_model, weights
from training.callback_runs import (
    CONFIG,
    KINDS,
    lines,
    make_base,
    make_subspace,
    make_trainer,
    moments,
    other_rows,
    own_rows,
    retentions,
    run,
)

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def subspace() -> SafetySubspace:
    return make_subspace()


@pytest.fixture(scope="module")
def course(subspace: SafetySubspace, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Retention before each step of the training that all tests here share, and after the last."""
    callback = LoxCallback(subspace, every_n_steps=1)
    run(tmp_path_factory.mktemp("course"), callback)
    found = retentions(callback)
    assert len(set(found)) == len(found) == 7
    return found


def between(left: float, right: float) -> float:
    return (left + right) / 2


def falling_limit(course: list[float], step: int) -> float:
    """A limit that retention is first under at this step."""
    limit = between(min(course[:step]), course[step])
    assert course[step] < limit < min(course[:step]), "retention falls in this training"
    return limit


def read(model: Any, subspace: SafetySubspace) -> float:
    return DriftMonitor(model, subspace).read().retention


# --- arguments


def test_all_problems_with_arguments_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        LoxCallback(CONFIG, "halt", metric="asr", below=1, above=2, patience=0, every_n_steps=0, strength=1.0)
    wanted = ["action is 'halt'", "metric 'asr' needs probe", "given twice", "patience is 0", "every_n_steps is 0"]
    assert [words for words in [*wanted, "strength is for"] if words not in str(error.value)] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"action": "stop"}, "'stop' needs a threshold"),
        ({"metric": "ratio", "below": 0.9}, "'ratio' needs base_model"),
        ({"metric": "r_ft", "below": 0.9}, "'r_ft' needs base_model"),
        ({"metric": "refusal_perplexity", "above": 9}, "needs probe"),
        ({"metric": "loss", "above": 9}, "expected one of retention"),
        ({"patience": 2}, "patience needs a threshold"),
        ({"strength": 1.0}, "strength is for action 'reapply'"),
        ({"strength": float("nan"), "action": "reapply"}, "strength is nan"),
        ({"strength": -1.0, "action": "reapply"}, "expected a positive number"),
        ({"metric": "asr", "above": 10, "probe": SafetyProbe(["a"])}, "asr is a share, at most 1: 10 % is 0.1"),
        ({"every_n_steps": 2.5}, "every_n_steps is 2.5"),
        ({"probe": "prompts.jsonl"}, "probe is a SafetyProbe, got str"),
        ({"subspace": 3}, "subspace is a SafetySubspace"),
        ({"subspace": "folder", "harden_after": True}, "harden_after takes a LoxConfig"),
        ({"harden_after": True, "below": 0.5}, "takes no below or above"),
        ({"harden_after": True, "action": "reapply"}, "takes no action"),
        ({"harden_after": True, "every_n_steps": 5}, "takes no every_n_steps"),
        ({"harden_after": "yes"}, "harden_after is 'yes'"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LoxCallback(**{"subspace": CONFIG, **arguments})


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"action": "stop", "below": 0.5, "patience": 2},
        {"action": "reapply", "strength": 1.5},
        {"metric": "ratio", "below": 0.9, "base_model": "base"},
        {"harden_after": True},
        {"harden_after": True, "base_model": "base"},
    ],
)
def test_arguments_that_can(arguments: dict[str, Any]) -> None:
    assert LoxCallback(CONFIG, **arguments).readings == []


def test_a_subspace_that_is_not_there_is_said_before_any_trainer(tmp_path: Path) -> None:
    with pytest.raises(LoxError, match="nothing-here"):
        LoxCallback(tmp_path / "nothing-here")


# --- when it reads


@pytest.mark.parametrize("kind", KINDS)
def test_readings_of_every_trainer(kind: str, subspace: SafetySubspace, tmp_path: Path) -> None:
    callback = LoxCallback(subspace, every_n_steps=2)
    trainer = run(tmp_path, callback, kind)
    assert moments(callback) == [(0, "begin"), (2, "step"), (4, "step"), (6, "end")]
    assert retentions(callback)[0] == pytest.approx(1, abs=1e-6), "the model starts as the aligned one"
    assert retentions(callback)[-1] == pytest.approx(read(trainer.model, subspace), abs=1e-9)
    assert abs(retentions(callback)[-1] - 1) > 1e-4
    assert [row["step"] for row in own_rows(trainer)] == [0, 2, 4, 6]
    assert [row["lox/retention"] for row in own_rows(trainer)] == retentions(callback)


def test_without_every_n_steps_each_epoch_is_read(subspace: SafetySubspace, tmp_path: Path) -> None:
    callback = LoxCallback(subspace)
    run(tmp_path, callback, max_steps=-1, num_train_epochs=2)  # 12 rows in batches of 4
    assert moments(callback) == [(0, "begin"), (3, "epoch"), (6, "end")]


def test_gradient_accumulation_counts_optimiser_steps(subspace: SafetySubspace, tmp_path: Path) -> None:
    callback = LoxCallback(subspace, every_n_steps=1)
    run(tmp_path, callback, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert moments(callback) == [(0, "begin"), (1, "step"), (2, "step"), (3, "end")]


def test_every_evaluation_and_save_is_read_once_a_step(subspace: SafetySubspace, tmp_path: Path) -> None:
    callback = LoxCallback(subspace, every_n_steps=100)
    timing = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3}
    run(tmp_path, callback, **timing, eval_on_start=True)
    assert moments(callback) == [(0, "begin"), (2, "evaluate"), (3, "save"), (4, "evaluate"), (6, "end")]


def test_a_save_that_another_callback_asks_for_is_read(subspace: SafetySubspace, tmp_path: Path) -> None:
    class Saves(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save = state.global_step == 2

    callback = LoxCallback(subspace, every_n_steps=100)
    run(tmp_path, callback, callbacks=[callback, Saves()])
    assert moments(callback) == [(0, "begin"), (2, "save"), (6, "end")]


def test_evaluate_and_predict_outside_of_training(subspace: SafetySubspace, tmp_path: Path) -> None:
    callback = LoxCallback(subspace)
    trainer = make_trainer(tmp_path, "trainer", callbacks=[callback])
    assert "eval_loss" in trainer.evaluate()
    trainer.predict(trainer.eval_dataset)
    assert callback.readings == []
    trainer.train()
    before = len(callback.readings)
    assert before
    assert "eval_lox/retention" not in trainer.evaluate(), "the model may have changed since the training"
    assert len(callback.readings) == before


def test_a_second_training_starts_afresh(subspace: SafetySubspace, tmp_path: Path) -> None:
    callback = LoxCallback(subspace, every_n_steps=3)
    trainer = run(tmp_path, callback)
    first = callback.readings
    trainer.train()
    assert moments(callback) == [(0, "begin"), (3, "step"), (6, "end")]
    assert retentions(callback)[0] == pytest.approx(first[-1].drift.retention, abs=1e-9), "where it was"
    assert [line["drift"]["retention"] for line in lines(tmp_path)] == retentions(callback)


def test_values_of_every_matrix_are_in_the_journal(subspace: SafetySubspace, tmp_path: Path) -> None:
    run(tmp_path, LoxCallback(subspace, every_n_steps=3))
    for line in lines(tmp_path):
        assert {tensor["name"] for tensor in line["drift"]["tensors"]} == set(subspace.factors)


def test_the_base_adds_r_metrics(subspace: SafetySubspace, tmp_path: Path) -> None:
    callback = LoxCallback(subspace, base_model=make_base(), metric="ratio", below=0.0)
    trainer = run(tmp_path, callback)
    assert {"lox/retention", "lox/r_ft", "lox/r_align", "lox/ratio"} <= own_rows(trainer)[-1].keys()
    assert callback.readings[0].drift.ratio == pytest.approx(1, abs=1e-4)


# --- what it leaves alone


@pytest.mark.parametrize("kind", KINDS)
def test_logging_changes_neither_weights_nor_the_rows_of_the_trainer(
    kind: str, subspace: SafetySubspace, tmp_path: Path
) -> None:
    """Every step is logged and read: the trap is that a row within a step takes the place of the trainer's own."""
    timing = {"eval_strategy": "steps", "eval_steps": 2}
    plain = make_trainer(tmp_path / "plain", kind, **timing)
    plain.train()
    watched = run(tmp_path / "watched", LoxCallback(subspace, every_n_steps=1), kind, **timing)
    assert zoo.same_bits(weights(plain.model), weights(watched.model))
    assert other_rows(watched) == other_rows(plain)
    assert sum("loss" in row for row in other_rows(watched)) == 6
    if kind != "trainer":
        assert "mean_token_accuracy" in other_rows(watched)[0] or "rewards/margins" in other_rows(watched)[0]
    assert {key for row in own_rows(watched) for key in row} == {"lox/retention", "step", "epoch"}


def test_the_control_a_plain_call_of_log_loses_rows(subspace: SafetySubspace, tmp_path: Path) -> None:
    class Naive(TrainerCallback):
        trainer: Any = None

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.trainer.log({"lox/retention": 1.0})

    naive = Naive()
    naive.trainer = make_trainer(tmp_path, callbacks=[naive])
    naive.trainer.train()
    rows = other_rows(naive.trainer)
    assert not any("loss" in row for row in rows)
    assert any("mean_token_accuracy" in row for row in own_rows(naive.trainer)), "and took TRL's running means"


def test_a_probe_asks_at_every_reading_and_changes_nothing(subspace: SafetySubspace, tmp_path: Path) -> None:
    probe = SafetyProbe(["what is 1 plus 2 ?"], max_new_tokens=4, refusal="sorry i can not .")
    limit = {"metric": "refusal_perplexity", "above": 1e-3}
    callback = LoxCallback(subspace, probe=probe, every_n_steps=3, **limit)
    plain = make_trainer(tmp_path / "plain")
    plain.train()
    trainer = run(tmp_path / "asked", callback)
    assert zoo.same_bits(weights(plain.model), weights(trainer.model))
    for row in own_rows(trainer):
        assert {"lox/asr", "lox/refusal_perplexity"} <= row.keys()
    perplexity = [row["lox/refusal_perplexity"] for row in own_rows(trainer)]
    assert len(set(perplexity)) == 3
    assert all(reading.tripped for reading in callback.readings)


def test_without_attach_only_the_history_has_rows(subspace: SafetySubspace, tmp_path: Path) -> None:
    callback = LoxCallback(subspace, every_n_steps=1)
    plain = make_trainer(tmp_path / "plain")
    plain.train()
    trainer = make_trainer(tmp_path, callbacks=[callback])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="LoxCallback")  # nothing to warn of: there are no trackers
        trainer.train()
    assert [row["step"] for row in own_rows(trainer)] == list(range(7))
    assert other_rows(trainer) == other_rows(plain)


def test_a_callback_attached_to_another_trainer_does_not_log_there(subspace: SafetySubspace, tmp_path: Path) -> None:
    callback = LoxCallback(subspace, every_n_steps=3)
    other = make_trainer(tmp_path / "other")
    callback.attach(other)
    trainer = make_trainer(tmp_path, callbacks=[callback])
    trainer.train()
    assert own_rows(other) == []
    assert len(own_rows(trainer)) == 3


def test_attach_adds_the_callback_once(subspace: SafetySubspace, tmp_path: Path) -> None:
    callback = LoxCallback(subspace)
    trainer = make_trainer(tmp_path, callbacks=[callback])
    assert callback.attach(trainer) is callback
    assert trainer.callback_handler.callbacks.count(callback) == 1
    other = make_trainer(tmp_path)
    callback.attach(other)
    assert other.callback_handler.callbacks.count(callback) == 1


# --- stop


def test_stop_saves_and_names_the_last_safe_checkpoint(
    subspace: SafetySubspace, course: list[float], tmp_path: Path
) -> None:
    callback = LoxCallback(subspace, "stop", below=falling_limit(course, 4), every_n_steps=1)
    with pytest.warns(UserWarning, match="stops the training at step 4: retention below") as caught:
        trainer = run(tmp_path, callback, save_strategy="steps", save_steps=1)
    safe = tmp_path / "checkpoint-3"
    assert callback.last_safe_checkpoint == safe
    assert any(f"The last safe checkpoint is {safe}." in str(item.message) for item in caught)
    assert trainer.state.global_step == 4
    assert (tmp_path / "checkpoint-4").is_dir()
    assert not (tmp_path / "checkpoint-5").exists()
    assert [reading.tripped for reading in callback.readings] == [False] * 4 + [True]


def test_stop_saves_even_where_nothing_else_does_and_says_how_to_have_a_safe_checkpoint(
    subspace: SafetySubspace, course: list[float], tmp_path: Path
) -> None:
    callback = LoxCallback(subspace, "stop", below=falling_limit(course, 3), every_n_steps=1)
    with pytest.warns(UserWarning, match="No safe checkpoint is there.*save_steps"):
        run(tmp_path, callback)
    assert callback.last_safe_checkpoint is None
    assert [item.name for item in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_checkpoint_that_the_limit_on_saves_removed_is_not_named(
    subspace: SafetySubspace, course: list[float], tmp_path: Path
) -> None:
    limit = falling_limit(course, 4)
    callback = LoxCallback(subspace, "stop", below=limit, patience=2, every_n_steps=1)
    with pytest.warns(UserWarning, match="No safe checkpoint is there.*save_total_limit"):
        trainer = run(tmp_path, callback, save_strategy="steps", save_steps=1, save_total_limit=1)
    assert trainer.state.global_step == 5
    assert callback.last_safe_checkpoint is None


def test_patience_waits_for_readings_in_a_row(subspace: SafetySubspace, course: list[float], tmp_path: Path) -> None:
    limit = falling_limit(course, 3)
    assert all(value < limit for value in course[3:])
    callback = LoxCallback(subspace, "stop", below=limit, patience=3, every_n_steps=1)
    with pytest.warns(UserWarning, match="at 3 readings in a row"):
        trainer = run(tmp_path, callback)
    assert trainer.state.global_step == 5


def test_a_threshold_that_is_not_crossed_stops_nothing(
    subspace: SafetySubspace, course: list[float], tmp_path: Path
) -> None:
    callback = LoxCallback(subspace, "stop", below=min(course) - 0.01, every_n_steps=1)
    assert run(tmp_path, callback).state.global_step == 6


def test_stop_at_an_evaluation(subspace: SafetySubspace, course: list[float], tmp_path: Path) -> None:
    limit = falling_limit(course, 4)
    callback = LoxCallback(subspace, "stop", below=limit, every_n_steps=100)
    with pytest.warns(UserWarning, match="stops the training at step 4"):
        trainer = run(tmp_path, callback, eval_strategy="steps", eval_steps=2)
    assert trainer.state.global_step == 4
    assert (tmp_path / "checkpoint-4").is_dir()


def test_an_older_runs_checkpoint_is_not_called_safe(
    subspace: SafetySubspace, course: list[float], tmp_path: Path
) -> None:
    run(tmp_path, LoxCallback(subspace, every_n_steps=1), save_strategy="steps", save_steps=2, learning_rate=1e-3)
    assert (tmp_path / "checkpoint-2").is_dir()
    callback = LoxCallback(subspace, "stop", below=falling_limit(course, 4), every_n_steps=1)
    with pytest.warns(UserWarning, match="No safe checkpoint"):
        run(tmp_path, callback)
    assert callback.last_safe_checkpoint is None


# --- reapply


@pytest.mark.parametrize("kind", KINDS)
def test_reapply_at_the_end_is_in_the_last_checkpoint(kind: str, subspace: SafetySubspace, tmp_path: Path) -> None:
    callback = LoxCallback(subspace, "reapply", every_n_steps=3)
    trainer = run(tmp_path, callback, kind, save_strategy="steps", save_steps=6)
    end = callback.readings[-1]
    assert moments(callback) == [(0, "begin"), (3, "step"), (6, "end")]
    assert abs(end.drift.retention - 1) > 1e-4, "there was something to bring back"
    assert end.retention_after == pytest.approx(1, abs=1e-5)
    assert end.reapplied > 0
    assert not callback.readings[1].reapplied
    row = own_rows(trainer)[-1]
    assert row["lox/reapplied"] == end.reapplied
    assert row["lox/retention_after"] == end.retention_after
    assert read(trainer.model, subspace) == pytest.approx(end.retention_after, abs=1e-9)
    saved = type(trainer.model).from_pretrained(tmp_path / "checkpoint-6")
    assert read(saved, subspace) == pytest.approx(end.retention_after, abs=1e-6)


def test_reapply_to_a_strength(subspace: SafetySubspace, tmp_path: Path) -> None:
    callback = LoxCallback(subspace, "reapply", strength=1.5)
    trainer = run(tmp_path, callback)
    assert read(trainer.model, subspace) == pytest.approx(1.5, abs=1e-5)


def test_reapply_at_readings_that_cross_the_threshold(
    subspace: SafetySubspace, course: list[float], tmp_path: Path
) -> None:
    callback = LoxCallback(subspace, "reapply", below=falling_limit(course, 3), every_n_steps=1)
    run(tmp_path, callback)
    assert [bool(reading.reapplied) for reading in callback.readings[:4]] == [False] * 3 + [True]
    assert retentions(callback)[:4] == pytest.approx(course[:4], abs=1e-6)
    assert callback.readings[4].drift.retention > course[4], "training goes on from the corrected weights"
    for reading in callback.readings:
        assert bool(reading.reapplied) == reading.tripped


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_reapply_on_lora_is_in_what_the_save_keeps(kind: str, subspace: SafetySubspace, tmp_path: Path) -> None:
    callback = LoxCallback(subspace, "reapply", every_n_steps=3)
    lora = {"with_peft_config": LORA, "learning_rate": 2e-2}
    run(tmp_path, callback, kind, save_strategy="steps", save_steps=6, **lora)
    end = callback.readings[-1]
    assert abs(end.drift.retention - 1) > 1e-4
    assert end.retention_after == pytest.approx(1, abs=1e-5)
    assert (tmp_path / "checkpoint-6" / "lox").is_dir()
    assert read(load_adapters(tmp_path / "checkpoint-6"), subspace) == pytest.approx(end.retention_after, abs=1e-5)


def test_reapply_again_after_the_best_model_was_loaded(subspace: SafetySubspace, tmp_path: Path) -> None:
    callback = LoxCallback(subspace, "reapply", every_n_steps=2)
    timing = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = run(tmp_path, callback, **timing, **best)
    assert trainer.state.best_global_step == 2, "the loss falls in this training"
    assert moments(callback)[-2:] == [(6, "end"), (6, "end")]
    assert callback.readings[-1].drift.retention == pytest.approx(callback.readings[1].drift.retention, abs=1e-6)
    assert read(trainer.model, subspace) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("is_corrected", [True, False])
def test_the_best_model_under_lora_comes_with_its_own_correction(
    is_corrected: bool, subspace: SafetySubspace, tmp_path: Path
) -> None:
    lora = {"with_peft_config": LORA, "learning_rate": 2e-2}
    plain = LoxCallback(subspace, every_n_steps=1)
    run(tmp_path / "plain", plain, **lora)
    below = falling_limit(retentions(plain), 1 if is_corrected else 6)
    callback = LoxCallback(subspace, "reapply", below=below, every_n_steps=1)
    timing = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = run(tmp_path, callback, **lora, **timing, **best)
    folder = tmp_path / f"checkpoint-{trainer.state.best_global_step}"
    assert folder != tmp_path / "checkpoint-6"
    saved = load_adapters(folder)
    end = callback.readings[-1]
    assert moments(callback)[-1] == (6, "end")
    assert end.drift.retention == pytest.approx(read(saved, subspace), abs=1e-6)
    assert (folder / "lox").is_dir() == is_corrected
    assert (tmp_path / "checkpoint-6" / "lox").is_dir(), "the control: the last step had another one"


def load_adapters(folder: Path) -> Any:
    """A checkpoint of adapters on the model it was trained from, both of them active."""
    from peft import PeftModel

    loaded: Any = PeftModel.from_pretrained(make_model(), folder)
    if (folder / "lox").is_dir():
        loaded.load_adapter(folder / "lox", "lox")
        loaded.base_model.set_adapter(["default", "lox"])
    return loaded


def test_reapply_where_another_callback_ends_the_training(subspace: SafetySubspace, tmp_path: Path) -> None:
    callback = LoxCallback(subspace, "reapply", every_n_steps=2)
    timing = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"metric_for_best_model": "lox/retention", "greater_is_better": True}
    stopping = EarlyStoppingCallback(1)
    trainer = make_trainer(tmp_path, callbacks=[callback, stopping], **timing, **best, load_best_model_at_end=True)
    trainer.train()
    assert trainer.state.global_step == 4
    saved = type(trainer.model).from_pretrained(tmp_path / "checkpoint-4")
    assert read(saved, subspace) == pytest.approx(1, abs=1e-5), "the last checkpoint has it"
    assert read(trainer.model, subspace) == pytest.approx(1, abs=1e-5), "and the best model, which was loaded then"


# --- models and settings


def test_metric_for_best_model_picks_the_checkpoint(
    subspace: SafetySubspace, course: list[float], tmp_path: Path
) -> None:
    timing = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    for greater in (True, False):
        callback = LoxCallback(subspace, every_n_steps=100)
        best = {"load_best_model_at_end": True, "metric_for_best_model": "lox/retention", "greater_is_better": greater}
        trainer = run(tmp_path / str(greater), callback, **timing, **best)
        wanted = (max if greater else min)(range(1, 7), key=lambda step: course[step])
        assert trainer.state.best_global_step == wanted
        assert read(trainer.model, subspace) == pytest.approx(course[wanted], abs=1e-6)
        assert retentions(callback)[-1] == pytest.approx(read(trainer.model, subspace), abs=1e-9)


def test_save_strategy_best(subspace: SafetySubspace, tmp_path: Path) -> None:
    callback = LoxCallback(subspace, below=0.0)
    best = {"save_strategy": "best", "metric_for_best_model": "lox/retention", "greater_is_better": True}
    run(tmp_path, callback, eval_strategy="steps", eval_steps=2, **best)
    assert callback.last_safe_checkpoint is not None


def test_directions_are_found_from_a_config(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_base().save_pretrained(base)
    config = LoxConfig(base_model_name_or_path=str(base), r=2, target_modules="all-linear")
    callback = LoxCallback(config, every_n_steps=3)
    run(tmp_path, callback)
    found, wanted = SafetySubspace.from_pretrained(tmp_path / "lox" / "subspace"), make_subspace()
    assert found.factors.keys() == wanted.factors.keys()
    assert retentions(callback)[0] == pytest.approx(1, abs=1e-6)


def test_directions_are_found_from_a_config_under_lora(tmp_path: Path) -> None:
    config = LoxConfig(r=2, target_modules="all-linear")
    callback = LoxCallback(config, every_n_steps=3, base_model=make_base())
    run(tmp_path, callback, with_peft_config=LORA, learning_rate=2e-2)
    found, wanted = SafetySubspace.from_pretrained(tmp_path / "lox" / "subspace"), make_subspace()
    assert found.factors.keys() == wanted.factors.keys()
    for name, factors in found.factors.items():
        torch.testing.assert_close(factors.S, wanted.factors[name].S)
    assert retentions(callback)[0] == pytest.approx(1, abs=1e-6)


def test_lora_and_compiled_models_are_read(subspace: SafetySubspace, tmp_path: Path) -> None:
    callback = LoxCallback(subspace, every_n_steps=3)
    trainer = run(tmp_path, callback, with_peft_config=LORA, learning_rate=2e-2)
    assert retentions(callback)[0] == pytest.approx(1, abs=1e-6)
    assert retentions(callback)[-1] == pytest.approx(read(trainer.model.merge_and_unload(), subspace), abs=1e-6)
    compiled: Any = torch.compile(make_model(), backend="eager")
    callback = LoxCallback(subspace, every_n_steps=1)
    run(tmp_path, callback, "trainer", model=compiled, max_steps=2, remove_unused_columns=False)
    assert len(set(retentions(callback))) == 3


def test_gradient_checkpointing_and_frozen_weights(subspace: SafetySubspace, tmp_path: Path) -> None:
    model = make_model()
    frozen = [name for name, weight in model.named_parameters() if "layers.0." in name]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    callback = LoxCallback(subspace, "reapply", every_n_steps=3)
    run(tmp_path, callback, model=model, gradient_checkpointing=True)
    before = make_model()
    assert all(torch.equal(model.get_parameter(name), before.get_parameter(name)) for name in frozen)
    assert read(model, subspace) == pytest.approx(1, abs=1e-5)


def test_a_model_that_does_not_fit_is_refused_before_the_first_step(tmp_path: Path, subspace: SafetySubspace) -> None:
    run(tmp_path, LoxCallback(subspace))
    before = lines(tmp_path)
    trainer = make_trainer(tmp_path, model=make_model(hidden_size=32), callbacks=[LoxCallback(subspace)])
    with pytest.raises(PairingError) as error:
        trainer.train()
    assert trainer.state.global_step == 0
    assert lines(tmp_path) == before, "what an older run left is there still"
    assert str(error.value).count("q_proj") >= 2, "all mismatches at once"


def test_an_unknown_backend_is_refused_before_the_first_step(tmp_path: Path, subspace: SafetySubspace) -> None:
    model = make_model()
    trainer = make_trainer(tmp_path, "trainer", model=model, callbacks=[LoxCallback(subspace)])
    model._flat_param = None  # as FSDP of the first kind has it
    with pytest.raises(UnsupportedModelError, match="FSDP"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_harden_after_hardens_what_the_training_leaves(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "base")
    config = LoxConfig(base_model_name_or_path=str(tmp_path / "base"), r=2, alpha=0.5, target_modules="all-linear")
    plain = make_trainer(tmp_path / "plain", "dpo")
    plain.train()
    aligned = weights(plain.model)
    callback = LoxCallback(config, harden_after=True)
    hardened = run(tmp_path / "hardened", callback, "dpo")
    directions = SafetySubspace.from_models(plain.model, make_model(), config, progressbar=False)
    assert callback.readings == []
    assert read(hardened.model, directions) == pytest.approx(1.5, abs=1e-4)
    assert not zoo.same_bits(weights(hardened.model), aligned)


@pytest.mark.parametrize("is_hardened", [True, False])
def test_a_dpo_reference_that_is_not_hardened_is_warned_of(
    is_hardened: bool, subspace: SafetySubspace, tmp_path: Path
) -> None:
    model = make_model()
    trainer = make_trainer(tmp_path, "dpo", model=model)
    if is_hardened:
        model.config.lox_config = CONFIG.to_dict()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        LoxCallback(subspace).attach(trainer)
    assert any("reference model is not" in str(item.message) for item in caught) == is_hardened
    trainer.ref_model.config.lox_config = CONFIG.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoxCallback(subspace).attach(trainer)


def test_a_plot_is_drawn_at_the_end(subspace: SafetySubspace, tmp_path: Path) -> None:
    run(tmp_path, LoxCallback(subspace))
    assert (tmp_path / "lox" / "drift.png").stat().st_size > 0


def test_the_package_loads_nothing_heavy() -> None:
    code = "import sys, lox_hf, lox_hf.training\n{}\nprint('torch' in sys.modules or 'transformers' in sys.modules)"
    for more, loaded in (("", "False"), ("lox_hf.LoxCallback", "True")):
        command = [sys.executable, "-c", code.format(more)]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == loaded
