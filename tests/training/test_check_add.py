"""What could not be corrected at the end of a training is refused before it, and matrices outlive corrections."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import zoo
from lox_hf import LoxConfig, LoxError, UnsupportedModelError, get_lox_model
from lox_hf.training.backends import open_weights
from training.adapted import LORA, all_axes, changes_of, differ, wrapped
from training.callback_runs import make_base, make_trainer

PLAIN = LoraConfig(**{**LORA, "target_modules": ["q_proj"]})


def hardened(**settings: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        aligned = zoo.make_model("llama")
        for weight in aligned.parameters():
            weight.data.add_(0.01 * torch.randn(weight.shape))
    return get_lox_model(aligned, LoxConfig(r=2), base_model=zoo.make_model("llama"), progressbar=False, **settings)


def names_of(model: Any, *parts: str) -> list[str]:
    return [name for name in open_weights(model).matrices if any(part in name for part in parts)]


@pytest.mark.parametrize(
    ("kind", "parts", "message"),
    [
        ("mixtral", ("experts.0.w1", "q_proj"), "experts.0.w1.* can carry no LoRA|can carry no LoRA.*experts.0.w1"),
        ("llama", ("embed_tokens", "q_proj"), "no linear layers: model.embed_tokens"),
    ],
)
def test_matrices_that_carry_no_correction(kind: str, parts: tuple[str, ...], message: str) -> None:
    model = wrapped(kind, target_modules=["q_proj"])
    with pytest.raises(UnsupportedModelError, match=message):
        open_weights(model).check_add(names_of(model, *parts))
    open_weights(model).check_add(names_of(model, "q_proj", "v_proj"))  # control
    assert list(model.peft_config) == ["default"]


def test_the_adapter_of_a_hardened_model_is_not_taken_for_a_correction() -> None:
    model = hardened()
    model.add_adapter("default", PLAIN)
    model.base_model.set_adapter(["default", "lox"])
    with pytest.raises(LoxError, match=r"get_lox_model made it.*merge_and_unload\(\).*another adapter_name"):
        open_weights(model).check_add(names_of(model, "q_proj"))
    # What the message says to do.
    merged = get_peft_model(hardened().merge_and_unload(), PLAIN)
    other = hardened(adapter_name="hardening")
    other.add_adapter("default", PLAIN)
    other.base_model.set_adapter(["default", "hardening"])
    for model in (merged, other):
        weights = open_weights(model)
        weights.check_add(names_of(model, "q_proj"))
        weights.add(changes_of(weights, "q_proj"))
        weights.check_add(names_of(model, "q_proj"))  # a correction of ours is there


def test_an_adapter_of_that_name_that_is_trained() -> None:
    model = get_peft_model(zoo.make_model("llama"), PLAIN, adapter_name="lox")
    with pytest.raises(LoxError, match="give it another name"):
        open_weights(model).check_add(names_of(model, "q_proj"))


def test_a_reference_adapter_of_dpo(tmp_path: Any) -> None:
    trained = get_peft_model(make_base(), PLAIN)
    trainer = make_trainer(tmp_path, "dpo", trained, with_ref_model=None)
    with pytest.raises(UnsupportedModelError, match="adapter 'ref'"):
        open_weights(trainer.model).check_add(names_of(trainer.model, "q_proj"))


def test_a_plain_model_takes_everything() -> None:
    weights = open_weights(zoo.make_model("llama"))
    weights.check_add(weights.matrices)


def test_refreshed_matrices_know_corrections_on_new_modules() -> None:
    model = wrapped(target_modules=["q_proj"])
    weights = open_weights(model)
    directions = all_axes(weights)

    def now(of: Any) -> dict[str, Tensor]:
        return {name: of.matrices[name].coordinates(along) for name, along in directions.items()}

    before = now(weights)
    weights.add(changes_of(weights, "v_proj"))
    weights.refresh()
    assert differ(now(weights), before) > 0.01
    assert differ(now(weights), now(open_weights(model))) == 0
