"""A model under LoRA: what its matrices read as, and corrections in the adapter "lox" beside the trained one."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor, nn

import zoo
from lox_hf import LoxError, UnsupportedModelError
from lox_hf.training.backends import open_weights
from lox_hf.training.backends.correction_adapter import activate_correction
from training.adapted import (
    LORA,
    TARGETS,
    all_axes,
    axes,
    changes_of,
    differ,
    load_both,
    logits,
    merged,
    read,
    wrapped,
)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", TARGETS)
def test_a_matrix_reads_as_merging_would_make_it(kind: str, rslora: bool) -> None:
    model = wrapped(kind, use_rslora=rslora, rank_pattern={"q_proj": 2})
    whole = read(merged(model))
    assert differ(read(model), whole) < 1e-5
    dense, expected = open_weights(model), open_weights(merged(model))
    assert all(torch.allclose(dense.get(name), expected.get(name), atol=1e-6) for name in expected.infos())
    with model.disable_adapter():
        base = read(model)
    assert differ(base, whole) > 0.01  # control: the adapters matter
    assert differ(base, read(zoo.make_model(kind))) < 1e-6


def test_adapters_are_looked_up_whenever_a_matrix_is_read() -> None:
    model = wrapped(target_modules=["q_proj"])
    weights = open_weights(model)
    directions = all_axes(weights)

    def now() -> dict[str, Tensor]:
        return {name: weights.matrices[name].coordinates(along) for name, along in directions.items()}

    first = now()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.add_adapter("second", LoraConfig(**{**LORA, "target_modules": ["v_proj", "q_proj"]}))
    assert differ(now(), first) == 0
    model.base_model.set_adapter(["default", "second"])
    both = now()
    assert differ(both, first) > 0.01
    assert differ(both, read(merged(model), directions)) < 1e-5
    model.merge_adapter()  # the base weights change under the reading
    assert differ(now(), both) < 1e-5
    model.unmerge_adapter()
    model.set_adapter("default")
    assert differ(now(), first) < 1e-5


def test_a_frozen_base_is_read_once_and_a_trained_one_every_time() -> None:
    model = wrapped(target_modules=["q_proj"])
    weights, name = open_weights(model), "model.layers.0.mlp.up_proj.weight"
    parameter = model.get_base_model().get_parameter(name)
    along = axes(weights.matrices[name].shape)
    before = weights.matrices[name].coordinates(along)
    with torch.no_grad():
        parameter.add_(along.dense())
    assert torch.equal(weights.matrices[name].coordinates(along), before)
    parameter.requires_grad_(True)
    moved = weights.matrices[name].coordinates(along) - before
    assert torch.allclose(moved, torch.eye(3, dtype=torch.float64), atol=1e-5)


def test_a_copy_of_modules_to_save_is_the_weight_and_is_corrected_in_place(tmp_path: Path) -> None:
    model = wrapped(target_modules=["q_proj"], modules_to_save=["lm_head"])
    head = model.get_base_model().lm_head
    with torch.no_grad():
        head.modules_to_save["default"].weight.add_(0.1)
    weights = open_weights(model)
    assert torch.equal(weights.get("lm_head.weight"), head.modules_to_save["default"].weight)
    original = head.original_module.weight.clone()
    before = read(model)
    weights.add(changes_of(weights, "lm_head") | changes_of(weights, "v_proj"))
    moved = read(model)["lm_head.weight"] - before["lm_head.weight"]
    assert torch.allclose(moved, 0.05 * torch.eye(3, dtype=torch.float64), atol=1e-5)
    assert torch.equal(head.original_module.weight, original)
    model.save_pretrained(tmp_path)
    loaded = load_both(zoo.make_model("llama"), tmp_path)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (LoraConfig(**{**LORA, "target_modules": ["q_proj"], "use_dora": True}), "use_dora"),
        (LoraConfig(**{**LORA, "target_modules": ["q_proj"], "bias": "all"}), "bias"),
        (LoraConfig(**{**LORA, "target_modules": ["q_proj"], "trainable_token_indices": [1]}), "trainable_token"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM"), "IA3"),
    ],
    ids=["dora", "bias", "tokens", "ia3"],
)
def test_what_is_not_plain_lora_is_refused(config: Any, word: str) -> None:
    with pytest.raises(UnsupportedModelError, match=word):
        open_weights(get_peft_model(zoo.make_model("llama"), config))


def test_lora_on_a_convolution_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(4, 4, 3), nn.Linear(4, 4)

    with pytest.raises(UnsupportedModelError, match="first"):
        open_weights(get_peft_model(Net(), LoraConfig(r=2, target_modules=["first", "second"])))
    assert open_weights(get_peft_model(Net(), LoraConfig(r=2, target_modules=["second"]))).matrices.keys() == {
        "first.weight",
        "second.weight",
    }


def test_a_correction_moves_what_it_should_and_nothing_else() -> None:
    model = wrapped("gpt2", target_modules=["c_attn"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = copy.deepcopy(model.state_dict())
    weights = open_weights(model)
    directions = all_axes(weights)
    start, rng = read(model, directions), torch.get_rng_state()
    weights.add(changes_of(weights, "c_attn"))
    weights.add(changes_of(weights, "c_attn", 0.02) | changes_of(weights, "c_fc"))  # the adapter grows
    assert torch.equal(torch.get_rng_state(), rng)
    now = read(model, directions)
    for name in directions:
        size = 0.07 if "c_attn" in name else 0.05 if "c_fc" in name else 0.0
        assert torch.allclose(now[name] - start[name], size * torch.eye(3, dtype=torch.float64), atol=1e-5), name
    assert torch.allclose(logits(merged(model)), logits(model), atol=1e-5)
    after = {name.replace("c_fc.base_layer", "c_fc"): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.active_adapters == ["default", "lox"]
    for turn_on in (model.base_model.enable_adapter_layers, lambda: model.base_model.set_adapter(["default", "lox"])):
        turn_on()
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


def test_peft_would_train_a_correction_made_of_parameters() -> None:
    """The trap that `FixedFactor` is for: when this fails, PEFT keeps frozen adapters frozen and it can go."""
    model = wrapped(target_modules=["q_proj"])
    model.add_adapter("plain", LoraConfig(**{**LORA, "target_modules": ["q_proj"]}))
    model.base_model.set_adapter(["default", "plain"])
    model.set_requires_grad("plain", False)
    with model.disable_adapter():
        pass
    assert any(parameter.requires_grad for name, parameter in model.named_parameters() if ".plain." in name)


def test_corrections_that_cannot_be_kept_are_refused_before_anything_changes() -> None:
    model = wrapped("mixtral", target_modules=["q_proj", "embed_tokens"])
    weights = open_weights(model)
    good = changes_of(weights, "q_proj")
    before = read(model)
    with pytest.raises(UnsupportedModelError, match="experts"):
        weights.add(good | changes_of(weights, "experts.0.w1"))
    with pytest.raises(UnsupportedModelError, match="embed_tokens"):
        weights.add(good | changes_of(weights, "embed_tokens"))
    assert differ(read(model), before) == 0
    assert "lox" not in model.peft_config
    weights.add(good)
    now = read(model)
    assert differ(now, before) > 0.01  # control
    with pytest.raises(LoxError, match="other directions"):
        weights.add({name: (left, right.flip(0)) for name, (left, right) in good.items()})
    assert differ(read(model), now) == 0


def test_an_adapter_of_that_name_that_is_trained_is_left_alone() -> None:
    model = get_peft_model(zoo.make_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="lox")
    weights = open_weights(model)
    with pytest.raises(LoxError, match="another"):
        weights.add(changes_of(weights, "q_proj"))
    with pytest.raises(LoxError, match="another"):
        activate_correction(model)
    activate_correction(wrapped())
    activate_correction(zoo.make_model("llama"))
