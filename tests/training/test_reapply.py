"""`action="reapply"` in real trainings: what a run leaves and what its last checkpoint holds, both have it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import LlamaForCausalLM

from lox_hf import LoxCallback, SafetySubspace
from lox_hf.training.backends import open_weights
from lox_hf.training.correction import start_coordinates
from robustness.trainable import make_model
from training.callback_runs import make_subspace, own_rows, run

FULL: dict[str, Any] = {}
LORA: dict[str, Any] = {
    "with_peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "learning_rate": 2e-2,
}
RUNS = pytest.mark.parametrize(
    ("kind", "form"),
    [("sft", FULL), ("dpo", FULL), ("sft", LORA), ("dpo", LORA)],
    ids=["full SFT", "full DPO", "LoRA SFT", "LoRA DPO"],
)
SAVES: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
BACK = 1e-5
"""How far coordinates in float32 may be from their target, in units of ||S_k||."""


@pytest.fixture(scope="module")
def subspace() -> SafetySubspace:
    return make_subspace()


def away(model: Any, subspace: SafetySubspace, strength: float = 1.0) -> float:
    """||C - strength * diag(S)|| / ||S|| over all matrices: unlike retention, no errors cancel in this."""
    found = start_coordinates(open_weights(model), subspace)
    s = {name: subspace.factors[name].S.double() for name in found}
    missing = sum((found[name] - strength * s[name].diag()).square().sum().item() for name in found)
    return (missing / sum(value.square().sum().item() for value in s.values())) ** 0.5


def load(folder: Path) -> Any:
    """A checkpoint as a user loads it: the model, or its adapters on the model they were trained on."""
    if not (folder / "adapter_config.json").exists():
        return LlamaForCausalLM.from_pretrained(folder)
    model: Any = PeftModel.from_pretrained(make_model(), folder)
    if (folder / "lox").is_dir():
        model.load_adapter(folder / "lox", "lox")
        model.base_model.set_adapter(["default", "lox"])
    return model


@RUNS
def test_without_a_threshold_the_end_has_it(
    kind: str, form: dict[str, Any], subspace: SafetySubspace, tmp_path: Path
) -> None:
    callback = LoxCallback(subspace, "reapply", every_n_steps=2)
    trainer = run(tmp_path, callback, kind, **form, **SAVES)
    assert [bool(reading.reapplied) for reading in callback.readings] == [False, False, False, True]
    assert away(trainer.model, subspace) < BACK
    assert away(load(tmp_path / "checkpoint-6"), subspace) < BACK
    assert away(load(tmp_path / "checkpoint-4"), subspace) > 10 * BACK, "control: training moves it"
    rows = own_rows(trainer)
    assert [row.get("lox/reapplied") for row in rows] == [None, None, None, callback.readings[-1].reapplied]
    assert rows[-1]["lox/retention_after"] == pytest.approx(1, abs=BACK)


@RUNS
def test_with_a_threshold_every_reading_beyond_it_has_it(
    kind: str, form: dict[str, Any], subspace: SafetySubspace, tmp_path: Path
) -> None:
    # Under this limit whatever training does is beyond it, so that every reading after the first corrects.
    callback = LoxCallback(subspace, "reapply", below=1.45, strength=1.5, every_n_steps=2)
    trainer = run(tmp_path, callback, kind, **form, **SAVES)
    corrected = [reading for reading in callback.readings if reading.reapplied]
    assert corrected[0].step == 2
    assert corrected[0].reapplied == pytest.approx(0.5, abs=0.3)
    assert [reading.tripped for reading in callback.readings[:2]] == [True, True]
    for reading in callback.readings:
        assert bool(reading.reapplied) == (reading.tripped and reading.moment != "begin")
    for reading in corrected:
        assert reading.retention_after == pytest.approx(1.5, abs=BACK)
        assert away(load(tmp_path / f"checkpoint-{reading.step}"), subspace, 1.5) < BACK
    logged = [row["lox/reapplied"] for row in own_rows(trainer) if "lox/reapplied" in row]
    assert logged == [reading.reapplied for reading in corrected]


@pytest.mark.parametrize("form", [FULL, LORA], ids=["full", "LoRA"])
def test_a_threshold_that_is_not_crossed_changes_nothing(
    form: dict[str, Any], subspace: SafetySubspace, tmp_path: Path
) -> None:
    watched = run(tmp_path / "watched", LoxCallback(subspace, "reapply", below=-9.0, every_n_steps=2), **form)
    logged = run(tmp_path / "logged", LoxCallback(subspace, every_n_steps=2), **form)
    ours, theirs = watched.model.state_dict(), logged.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert away(watched.model, subspace) > 10 * BACK


@RUNS
def test_the_best_model_that_is_loaded_at_the_end_has_it(
    kind: str, form: dict[str, Any], subspace: SafetySubspace, tmp_path: Path
) -> None:
    callback = LoxCallback(subspace, "reapply", every_n_steps=2)
    # The loss falls, so by this rule the best checkpoint is an early one.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = run(tmp_path, callback, kind, **form, **SAVES, **best, eval_strategy="steps", eval_steps=2)
    assert (step := trainer.state.best_global_step) < 6
    assert away(load(tmp_path / f"checkpoint-{step}"), subspace) > 10 * BACK, "control: it was saved without"
    assert away(trainer.model, subspace) < BACK
    trainer.save_model(str(tmp_path / "final"))
    assert away(load(tmp_path / "final"), subspace) < BACK


@pytest.mark.parametrize("form", [FULL, LORA], ids=["full", "LoRA"])
def test_gradient_accumulation_counts_optimiser_steps(
    form: dict[str, Any], subspace: SafetySubspace, tmp_path: Path
) -> None:
    callback = LoxCallback(subspace, "reapply", below=9.0, every_n_steps=1)
    batches = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 3}
    trainer = run(tmp_path, callback, **form, **{**SAVES, "save_steps": 3}, **batches)
    assert [(reading.step, bool(reading.reapplied)) for reading in callback.readings] == [
        (0, False),
        (1, True),
        (2, True),
        (3, True),
    ]
    assert away(trainer.model, subspace) < BACK
    assert away(load(tmp_path / "checkpoint-3"), subspace) < BACK
