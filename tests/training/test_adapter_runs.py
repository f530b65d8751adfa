"""Corrections in real trainings under LoRA: they stay as they are, are saved, loaded, and resumed with."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from lox_hf import UnsupportedModelError
from lox_hf.training.backends import open_weights
from lox_hf.training.backends.correction_adapter import activate_correction
from robustness.trainable import make_model
from training.adapted import changes_of, load_both, logits, merged
from training.callback_runs import make_trainer


class Correct(TrainerCallback):
    """Adds a correction at one step and writes down what must not change after it."""

    def __init__(self, at: int, activate: bool = True) -> None:
        self.at, self.activate = at, activate
        self.kept: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step and self.activate:
            activate_correction(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self.at:
            weights = open_weights(model)
            weights.add(changes_of(weights, "proj", 0.3))
            self.kept = {name: t.clone() for name, t in model.state_dict().items() if ".default." not in name}


def train(
    folder: Path, kind: str, resume: str | None = None, *, at: int = 2, activate: bool = True, **changes: Any
) -> tuple[Any, Correct]:
    callback = Correct(at, activate)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    settings |= {"per_device_train_batch_size": 2, "max_grad_norm": 0.1}
    trainer = make_trainer(folder, kind, callbacks=[callback], with_peft_config=lora, **{**settings, **changes})
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def grad_norms(trainer: Any) -> list[float]:
    return [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Any]:
    """Every training once."""
    done: dict[tuple[str, bool], Any] = {}

    def get(kind: str, checkpointing: bool) -> Any:
        if (kind, checkpointing) not in done:
            folder = tmp_path_factory.mktemp(kind)
            done[kind, checkpointing] = (folder, *train(folder, kind, gradient_checkpointing=checkpointing))
        return done[kind, checkpointing]

    return get


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_correction_stays_as_it_is_while_training_goes_on(
    runs: Callable[[str, bool], Any], kind: str, checkpointing: bool
) -> None:
    folder, trainer, callback = runs(kind, checkpointing)
    model = trainer.model
    state = model.state_dict()
    assert any(".lox." in name and tensor.any() for name, tensor in callback.kept.items())
    assert all(torch.equal(state[name], tensor) for name, tensor in callback.kept.items())
    start = dict(make_model().named_parameters())
    plain = {name.removeprefix("base_model.model.").replace(".base_layer", ""): t for name, t in state.items()}
    assert all(torch.equal(plain[name], tensor) for name, tensor in start.items())
    assert model.active_adapters == ["default", "lox"]
    assert all(".default." in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    adapter = {step: load_file(folder / f"checkpoint-{step}/adapter_model.safetensors") for step in (2, 4)}
    assert any(not torch.equal(adapter[2][name], tensor) for name, tensor in adapter[4].items())  # it did train
    assert all(math.isfinite(loss) and loss < 20 for loss in losses(trainer))
    # Checkpointed activations are computed anew with the same graph, or the steps after the correction would differ.
    other = runs(kind, not checkpointing)[1]
    assert losses(trainer) == pytest.approx(losses(other), rel=1e-4)
    assert grad_norms(trainer) == pytest.approx(grad_norms(other), rel=1e-3)


def test_the_first_loss_of_dpo_is_ln_2_and_the_reference_has_no_correction(
    runs: Callable[[str, bool], Any], tmp_path: Path
) -> None:
    _, trainer, _ = runs("dpo", False)
    found = losses(trainer)
    assert found[0] == pytest.approx(math.log(2), abs=1e-5)
    assert found[1:] == pytest.approx([math.log(2)] * 3, abs=0.05)
    without = losses(train(tmp_path, "dpo", at=99)[0])
    assert found[:2] == without[:2]
    assert abs(found[2] - without[2]) > 1e-4  # the policy has it
    with trainer.model.disable_adapter():  # what the reference pass does
        assert torch.equal(logits(trainer.model), logits(make_model()))
    assert trainer.model.active_adapters == ["default", "lox"]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_stock_peft_loads_a_checkpoint(runs: Callable[[str, bool], Any], kind: str) -> None:
    folder, trainer, _ = runs(kind, False)
    checkpoint = folder / "checkpoint-4"
    assert json.loads((checkpoint / "lox" / "adapter_config.json").read_text())["r"] == 3
    assert (folder / "checkpoint-2" / "lox" / "adapter_model.safetensors").exists()
    expected = logits(trainer.model)
    loaded = load_both(make_model(), checkpoint)
    assert torch.equal(logits(loaded), expected)
    loaded.add_weighted_adapter(["default", "lox"], [1.0, 1.0], "both", combination_type="cat")
    loaded.set_adapter("both")
    assert torch.allclose(logits(loaded), expected, atol=1e-5)
    assert torch.allclose(logits(merged(loaded)), expected, atol=1e-5)
    loaded.set_adapter("default")
    assert not torch.allclose(logits(loaded), expected, atol=1e-3)  # control: the correction is not nothing


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_resumed_run_goes_on_as_the_other_did(runs: Callable[[str, bool], Any], kind: str, tmp_path: Path) -> None:
    folder, whole, callback = runs(kind, False)
    checkpoint = str(folder / "checkpoint-2")
    resumed, _ = train(tmp_path / "a", kind, checkpoint)
    assert losses(resumed) == losses(whole)
    state = resumed.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in callback.kept.items())
    forgotten, _ = train(tmp_path / "b", kind, checkpoint, activate=False)
    assert losses(forgotten)[:2] == losses(whole)[:2]  # they are the checkpoint's
    assert abs(losses(forgotten)[2] - losses(whole)[2]) > 1e-4  # control: what Trainer leaves on its own


def test_the_adapter_that_dpo_copies_as_its_reference_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer = make_trainer(tmp_path, "dpo", model=model, with_ref_model=None)
    assert "ref" in trainer.model.peft_config
    weights = open_weights(trainer.model)
    with pytest.raises(UnsupportedModelError, match="peft_config="):
        weights.add(changes_of(weights, "q_proj"))
