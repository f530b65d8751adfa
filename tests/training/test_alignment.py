"""Alignment that ends hardened: what it refuses before the first step, and that it is `apply_lox` at the end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

import zoo
from lox_hf import (
    AlreadyHardenedError,
    CheckpointError,
    ConfigError,
    LoxCallback,
    LoxConfig,
    NumericsError,
    PairingError,
    UnsupportedModelError,
    apply_lox,
)
from lox_hf.training.alignment import HardenAfter
from robustness.trainable import make_model, weights
from training.callback_runs import make_trainer, run

CONFIG = LoxConfig(r=2, alpha=0.5, target_modules="all-linear")
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that alignment starts from; their card names another base, as cards do."""
    folder = tmp_path_factory.mktemp("start")
    make_model().save_pretrained(folder)
    (folder / "README.md").write_text("---\nbase_model: nobody/nothing\n---\n")
    return folder


def load(folder: Path, **changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, **changes)


def named(base: Path, **changes: Any) -> LoxConfig:
    return LoxConfig(**{**CONFIG.to_dict(), "base_model_name_or_path": str(base), **changes})


def peft_model(model: Any, **changes: Any) -> Any:
    return get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **changes}))


def move(model: nn.Module, seed: int = 0) -> None:
    """What a training might do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter)


# --- real trainings


@pytest.mark.parametrize("kind", ["dpo", "sft"])
@pytest.mark.parametrize("is_named", [True, False], ids=["named base", "starting files"])
def test_full_training_ends_as_apply_lox_by_hand(kind: str, is_named: bool, start: Path, tmp_path: Path) -> None:
    by_hand = make_trainer(tmp_path / "plain", kind, model=load(start))
    by_hand.train()
    aligned = weights(by_hand.model)
    apply_lox(by_hand.model, CONFIG, base_model=start)
    config = named(start) if is_named else CONFIG
    trainer = run(tmp_path / "run", LoxCallback(config, harden_after=True), kind, model=load(start))
    assert zoo.same_bits(weights(trainer.model), weights(by_hand.model))
    assert not zoo.same_bits(weights(trainer.model), aligned)  # control


def test_dpo_with_lora_ends_as_apply_lox_by_hand(tmp_path: Path) -> None:
    by_hand = make_trainer(tmp_path / "plain", "dpo", with_peft_config=LORA, learning_rate=2e-2)
    by_hand.train()
    aligned = weights(by_hand.model)
    apply_lox(by_hand.model, CONFIG)
    callback = LoxCallback(CONFIG, harden_after=True)
    trainer = run(tmp_path / "run", callback, "dpo", with_peft_config=LORA, learning_rate=2e-2)
    assert zoo.same_bits(weights(trainer.model), weights(by_hand.model))
    assert not zoo.same_bits(weights(trainer.model), aligned)  # control
    assert {key: tensor.shape for key, tensor in aligned.items()} == {
        key: tensor.shape for key, tensor in trainer.model.state_dict().items()
    }


def test_a_save_writes_the_stamp_and_checkpoints_stay_as_they_were(start: Path, tmp_path: Path) -> None:
    callback = LoxCallback(CONFIG, harden_after=True)
    trainer = run(tmp_path, callback, "dpo", model=load(start), save_strategy="steps", save_steps=6)
    trainer.save_model()
    stamp = json.loads((tmp_path / "config.json").read_text())["lox_config"]
    assert (stamp["r"], stamp["alpha"], stamp["base_model_name_or_path"]) == (2, 0.5, str(start))
    assert zoo.same_bits(weights(load(tmp_path)), weights(trainer.model))
    assert "lox_config" not in json.loads((tmp_path / "checkpoint-6" / "config.json").read_text())
    assert not zoo.same_bits(weights(load(tmp_path / "checkpoint-6")), weights(trainer.model))


def test_what_cannot_be_hardened_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "dpo", callbacks=[LoxCallback(CONFIG, harden_after=True)])
    before = weights(trainer.model)
    with pytest.raises(ConfigError, match="was not loaded from files"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert zoo.same_bits(weights(trainer.model), before)


# --- where the base comes from


@pytest.mark.parametrize("form", ["folder", "module", "state dict"])
def test_a_base_that_is_given(form: str, start: Path) -> None:
    base: Any = {"folder": start, "module": load(start), "state dict": weights(load(start))}[form]
    by_hand, model = make_model(), make_model()
    ending = HardenAfter(CONFIG, base_model=base)
    ending.check(model)
    move(model)
    move(by_hand)
    report = ending.harden(model)
    apply_lox(by_hand, CONFIG, base_model=start)
    assert zoo.same_bits(weights(model), weights(by_hand))
    assert len(report.tensors) == 14


def test_starting_files_are_read_as_the_model_was_loaded(start: Path) -> None:
    model = load(start, dtype=torch.bfloat16)
    with pytest.raises(PairingError, match="another dtype"):  # control: a base that is named is not cast in silence
        HardenAfter(named(start)).check(model)
    base = {name: tensor.clone() for name, tensor in weights(model).items()}
    ending = HardenAfter(CONFIG)
    ending.check(model)
    move(model)
    by_hand = load(start, dtype=torch.bfloat16)
    move(by_hand)
    ending.harden(model)
    apply_lox(by_hand, CONFIG, base_model=base)
    assert zoo.same_bits(weights(model), weights(by_hand))


def test_a_base_that_is_the_model_itself_is_refused(start: Path) -> None:
    model = load(start)
    for base in (model, model.state_dict()):
        with pytest.raises(ConfigError, match="the model in training itself: 14 weights"):
            HardenAfter(CONFIG, base_model=base).check(model)
    HardenAfter(CONFIG, base_model=weights(model)).check(model)  # control: a copy


def test_a_model_from_a_trainers_checkpoint_has_to_name_its_base(start: Path, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(ConfigError, match="a trainer's checkpoint"):
        HardenAfter(CONFIG).check(load(tmp_path))
    HardenAfter(named(tmp_path)).check(load(tmp_path))
    HardenAfter(CONFIG).check(load(start))  # control


# --- other refusals


def test_full_training_refuses_what_it_could_not_harden(start: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        HardenAfter(named(tmp_path / "nothing")).check(load(start))
    with pytest.raises(PairingError) as error:
        HardenAfter(named(start)).check(make_model(hidden_size=32))
    assert str(error.value).count("q_proj") == 2, "all mismatches at once"
    with pytest.raises(ConfigError):
        HardenAfter(named(start, target_modules=["nothing"])).check(load(start))
    hardened = load(start)
    move(hardened)
    apply_lox(hardened, named(start))
    with pytest.raises(AlreadyHardenedError):
        HardenAfter(named(start)).check(hardened)
    with pytest.raises(UnsupportedModelError, match="meta"):
        HardenAfter(named(start)).check(load(start).to("meta"))


def test_lora_refuses_what_it_could_not_harden() -> None:
    with pytest.raises(UnsupportedModelError, match="use_dora"):
        HardenAfter(CONFIG).check(peft_model(make_model(), use_dora=True))
    with pytest.raises(ConfigError):
        HardenAfter(LoxConfig(target_modules=["down_proj"])).check(peft_model(make_model()))
    two = peft_model(make_model())
    two.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    two.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match="2 adapters are active"):
        HardenAfter(CONFIG).check(two)
    model = peft_model(make_model())
    HardenAfter(CONFIG).check(model)  # control: a fresh adapter, whose B is zero
    move(model)
    HardenAfter(CONFIG).harden(model)
    with pytest.raises(AlreadyHardenedError):
        HardenAfter(CONFIG).check(model)


@pytest.mark.parametrize("form", ["full", "LoRA"])
def test_a_training_that_ended_in_nan_is_said_and_left_alone(form: str, start: Path) -> None:
    model: Any = load(start) if form == "full" else peft_model(load(start))
    move(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    broken = next(name for name in reversed(trained) if "v_proj" in name)
    with torch.no_grad():
        model.get_parameter(broken)[0, 0] = float("nan")
    before = weights(model)
    with pytest.raises(NumericsError, match=r"layers\.1\.self_attn\.v_proj"):
        HardenAfter(CONFIG).harden(model)
    assert zoo.same_bits(weights(model), before)


def test_a_training_that_changed_nothing_is_said(start: Path) -> None:
    for model in (load(start), peft_model(load(start))):
        with pytest.raises(PairingError, match="nothing to extrapolate"):
            HardenAfter(CONFIG).harden(model)
