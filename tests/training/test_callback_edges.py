"""What could cost a training, or name the wrong checkpoint: judges that fail, saves of others, disks, plots."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import TrainerCallback

from lox_hf import (
    CheckpointError,
    ConfigError,
    LoxCallback,
    LoxConfig,
    Prompt,
    SafetyProbe,
    SafetySubspace,
    read_drift,
)
from training.callback_runs import lines, make_base, make_subspace, make_trainer, retentions, run

EVERY_TWO = {"save_strategy": "steps", "save_steps": 2}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}


@pytest.fixture(scope="module")
def subspace() -> SafetySubspace:
    return make_subspace()


class SaveAt(TrainerCallback):
    """Another callback that asks for a save, after ours has had its turn."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save |= state.global_step == self.step


class FailingJudge(TrainerCallback):
    """Finds that the model complied, until its endpoint is down for the answers after one step."""

    def __init__(self, fails_at: int) -> None:
        self.step, self.fails_at = 0, fails_at

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step = state.global_step + 1

    def __call__(self, prompts: Any, responses: Any) -> list[float]:
        if self.step == self.fails_at:
            raise RuntimeError("the endpoint is down")
        return [1.0] * len(responses)


def probe(judge: FailingJudge) -> SafetyProbe:
    return SafetyProbe(["question : a "], judge=judge, max_new_tokens=3, template="none")


def stored(folder: Path, subspace: SafetySubspace) -> float:
    return read_drift(folder, subspace, target_modules="all-linear", progressbar=False).retention


def test_what_another_callback_saves_is_read_as_it_was_saved(subspace: SafetySubspace, tmp_path: Path) -> None:
    callback = LoxCallback(subspace, "reapply", below=10.0, every_n_steps=100)
    trainer = make_trainer(tmp_path)
    callback.attach(trainer)
    trainer.add_callback(SaveAt(2))
    trainer.train()
    saved = next(reading for reading in callback.readings if reading.step == 2)
    assert saved.moment == "save" and not saved.reapplied and saved.tripped
    assert saved.drift.retention == pytest.approx(stored(tmp_path / "checkpoint-2", subspace), abs=1e-5)
    assert callback.readings[-1].reapplied  # control: readings that come in time do correct


def test_a_judge_that_fails_does_not_end_a_training_that_looks_for_its_best(
    subspace: SafetySubspace, tmp_path: Path
) -> None:
    judge = FailingJudge(fails_at=4)
    settings = {**EVALUATED, **EVERY_TWO, "metric_for_best_model": "lox/asr"}
    with pytest.warns(UserWarning, match="endpoint is down"):
        trainer = run(tmp_path, LoxCallback(subspace, probe=probe(judge)), callbacks=[judge], **settings)
    assert trainer.state.global_step == 6 and trainer.state.best_metric == 1.0


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_probe_under_mixed_precision(lora: bool, subspace: SafetySubspace, tmp_path: Path) -> None:
    """TRL trains in bfloat16 unless it is told not to: weights of float32, products under autocast."""
    callback = LoxCallback(subspace, every_n_steps=2, probe=probe(FailingJudge(fails_at=99)))
    adapters = {"with_peft_config": LoraConfig(r=2, task_type="CAUSAL_LM")} if lora else {}
    trainer = run(tmp_path, callback, bf16=True, **adapters)
    assert trainer.state.global_step == 6
    assert all("refusal_perplexity" in reading.figures() for reading in callback.readings)


@pytest.mark.parametrize(
    ("metric", "prompts", "kind"),
    [("asr", [Prompt("a", harmful=False)], "harmful"), ("over_refusal", ["a"], "harmless")],
)
def test_a_probe_that_cannot_measure_the_metric_is_refused(
    metric: str, prompts: list[Any], kind: str, subspace: SafetySubspace, tmp_path: Path
) -> None:
    callback = LoxCallback(subspace, "stop", metric=metric, above=0.1, probe=SafetyProbe(prompts, template="none"))
    with pytest.raises(ConfigError, match=f"'{metric}' is measured on {kind} prompts"):
        run(tmp_path, callback)


def test_attach_takes_a_trainer(subspace: SafetySubspace) -> None:
    with pytest.raises(ConfigError, match="takes a transformers or TRL trainer, got LlamaForCausalLM"):
        LoxCallback(subspace).attach(make_base())


def test_a_checkpoint_that_was_not_measured_is_not_called_safe(subspace: SafetySubspace, tmp_path: Path) -> None:
    judge = FailingJudge(fails_at=4)
    callback = LoxCallback(subspace, "stop", metric="asr", above=1.0, every_n_steps=1, probe=probe(judge))
    with pytest.warns(UserWarning, match="endpoint is down"):
        run(tmp_path, callback, callbacks=[judge], **EVERY_TWO, max_steps=4)
    assert "asr" not in callback.readings[-1].figures()
    assert callback.last_safe_checkpoint == tmp_path / "checkpoint-2"


def test_a_stop_is_saved_whatever_an_evaluation_decides(subspace: SafetySubspace, tmp_path: Path) -> None:
    best = {"save_strategy": "best", "metric_for_best_model": "lox/retention", "greater_is_better": True}
    callback = LoxCallback(subspace, "stop", below=0.999, patience=2, every_n_steps=100)
    with pytest.warns(UserWarning, match="stops the training"):
        trainer = run(tmp_path, callback, **EVALUATED, **best, max_steps=12)
    assert trainer.state.global_step < 12
    assert (tmp_path / f"checkpoint-{trainer.state.global_step}").is_dir()


def test_metrics_and_the_last_safe_checkpoint_count_the_correction(subspace: SafetySubspace, tmp_path: Path) -> None:
    found = {}

    class Keep(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            found[state.global_step] = metrics["eval_lox/retention"]

    callback = LoxCallback(subspace, "reapply", below=0.9999, every_n_steps=100)
    trainer = make_trainer(tmp_path, **EVALUATED, **EVERY_TWO)
    callback.attach(trainer)
    trainer.add_callback(Keep())
    trainer.train()
    assert min(retentions(callback)) < 0.99
    assert found[2] == pytest.approx(stored(tmp_path / "checkpoint-2", subspace), abs=1e-5)
    assert found[2] == pytest.approx(1, abs=1e-4)
    assert callback.last_safe_checkpoint == tmp_path / "checkpoint-6"


def test_a_figure_that_cannot_be_drawn_does_not_end_the_training(subspace: SafetySubspace, tmp_path: Path) -> None:
    class Block(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            (tmp_path / "lox" / "drift.png").mkdir(exist_ok=True)

    with pytest.warns(UserWarning, match="No plot of the run is drawn"):
        trainer = run(tmp_path, LoxCallback(subspace), callbacks=[Block()])
    assert trainer.state.global_step == 6


def test_a_disk_that_is_gone_does_not_end_the_training(subspace: SafetySubspace, tmp_path: Path) -> None:
    class Remove(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            shutil.rmtree(tmp_path / "lox", ignore_errors=True)

    callback = LoxCallback(subspace, every_n_steps=2)
    with pytest.warns(UserWarning, match="does not take any more readings"):
        trainer = run(tmp_path, callback, callbacks=[Remove()])
    assert trainer.state.global_step == 6 and len(callback.readings) == 4


def test_directions_of_the_users_own_are_not_removed(tmp_path: Path) -> None:
    make_base().save_pretrained(tmp_path / "base")
    config = LoxConfig(str(tmp_path / "base"), r=2, target_modules="all-linear")
    output = tmp_path / "run"
    run(output, LoxCallback(config))
    run(output, LoxCallback(output / "lox" / "subspace"))
    assert SafetySubspace.from_pretrained(output / "lox" / "subspace").factors


def test_resuming_elsewhere_says_what_is_missing(tmp_path: Path) -> None:
    make_base().save_pretrained(tmp_path / "base")
    config = LoxConfig(str(tmp_path / "base"), r=2, target_modules="all-linear")
    run(tmp_path / "run", LoxCallback(config), **EVERY_TWO)
    with pytest.raises(CheckpointError, match="Resume in its output_dir"):
        run(tmp_path / "other", LoxCallback(config), resume=str(tmp_path / "run" / "checkpoint-2"))


def test_matrices_are_on_disk_and_not_in_memory(subspace: SafetySubspace, tmp_path: Path) -> None:
    callback = LoxCallback(subspace, every_n_steps=2)
    run(tmp_path, callback, **EVERY_TWO)
    assert not any(reading.drift.tensors for reading in callback.readings)
    assert all(len(line["drift"]["tensors"]) == len(subspace.factors) for line in lines(tmp_path))
    run(tmp_path, callback, resume=str(tmp_path / "checkpoint-4"), **EVERY_TWO)
    assert not any(reading.drift.tensors for reading in callback.readings)
    assert all(len(line["drift"]["tensors"]) == len(subspace.factors) for line in lines(tmp_path))
