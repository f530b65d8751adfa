"""`apply_lox` and what comes after it: moved weights, copies, second applications, adapters."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import zoo
from lox_hf import (
    AlreadyHardenedError,
    ConfigError,
    LoxConfig,
    LoxError,
    SafetySubspace,
    UnsupportedModelError,
    apply_lox,
    get_lox_model,
    hardening_report,
    revert_lox,
)


@pytest.fixture
def pair(tmp_path: Path) -> zoo.Pair:
    return zoo.save_pair("llama", tmp_path / "pair")


def load(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_cast_model_is_not_reverted_in_silence(pair: zoo.Pair) -> None:
    model = apply_lox(load(pair.aligned_dir), LoxConfig(str(pair.base_dir), r=4))
    model.to(torch.float32)
    with pytest.raises(LoxError, match="changed, cast or moved"):
        revert_lox(model)
    assert model.config.lox_config["r"] == 4  # still hardened, and still says so


def test_a_copy_is_reverted_by_itself(pair: zoo.Pair) -> None:
    aligned = state(load(pair.aligned_dir))
    model = apply_lox(load(pair.aligned_dir), LoxConfig(str(pair.base_dir), r=4))
    hardened = state(model)
    other = revert_lox(copy.deepcopy(model))
    assert zoo.same_bits(state(other), aligned)
    assert zoo.same_bits(state(model), hardened)


def test_two_applications_are_taken_back_one_by_one(pair: zoo.Pair) -> None:
    config = LoxConfig(str(pair.base_dir), r=4, alpha=0.5)
    model = load(pair.aligned_dir)
    aligned = state(model)
    once = state(apply_lox(model, config))
    with pytest.raises(AlreadyHardenedError):
        apply_lox(model, config)
    apply_lox(model, config, allow_repeat=True)
    assert not zoo.same_bits(state(model), once)
    assert zoo.same_bits(state(revert_lox(model)), once)
    assert zoo.same_bits(state(revert_lox(model)), aligned)
    assert not hasattr(model.config, "lox_config")
    with pytest.raises(LoxError, match="nothing to take back"):
        revert_lox(model)


def test_a_hardened_model_can_be_pickled(pair: zoo.Pair) -> None:
    model = apply_lox(load(pair.aligned_dir), LoxConfig(str(pair.base_dir), r=4))
    assert zoo.same_bits(state(pickle.loads(pickle.dumps(model))), state(model))


def test_weights_tied_by_hand_are_edited_once() -> None:
    def make(scale: float) -> nn.Module:
        model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False)})
        nn.init.constant_(model["a"].weight, scale)
        model["b"].weight = model["a"].weight
        return model

    model = apply_lox(make(2.0), LoxConfig(r=None, alpha=0.5), base_model={"a.weight": torch.ones(8, 8)})
    assert torch.equal(model["b"].weight, torch.full((8, 8), 2.5))


def test_a_config_that_is_no_transformers_config_does_no_harm() -> None:
    model, base = nn.Linear(8, 8), nn.Linear(8, 8)
    model.config = {"mine": 1}
    aligned = model.weight.clone()
    apply_lox(model, LoxConfig(r=2), base_model=base)
    assert not torch.equal(model.weight, aligned)
    assert torch.equal(revert_lox(model).weight, aligned)


def test_lox_itself_is_not_taken_for_an_alignment(pair: zoo.Pair) -> None:
    model = get_lox_model(load(pair.aligned_dir), LoxConfig(str(pair.base_dir), r=4))
    assert hardening_report(model).energy_share > 0.5
    with pytest.raises(AlreadyHardenedError):
        apply_lox(model, LoxConfig(r=4))
    with pytest.raises(LoxError, match=r"disable_adapter"):
        revert_lox(model)


@pytest.fixture
def adapted(pair: zoo.Pair) -> nn.Module:
    model = get_peft_model(load(pair.aligned_dir), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def test_alpha_zero_leaves_an_adapter_as_it_is(adapted: nn.Module) -> None:
    before = state(adapted)
    assert zoo.same_bits(state(apply_lox(adapted, LoxConfig(alpha=0.0))), before)
    assert not zoo.same_bits(state(apply_lox(adapted, LoxConfig(alpha=0.5), allow_repeat=True)), before)


def test_an_adapter_takes_no_base(adapted: nn.Module, pair: zoo.Pair) -> None:
    with pytest.raises(ConfigError, match="needs no base"):
        apply_lox(adapted, LoxConfig(), base_model=pair.base_dir)


def test_lora_on_fused_experts_is_refused(tmp_path: Path) -> None:
    pair = zoo.save_pair("mixtral", tmp_path / "pair")
    experts = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(UnsupportedModelError, match="target_parameters"):
        apply_lox(get_peft_model(load(pair.aligned_dir), experts), LoxConfig(r=2))


def test_a_subspace_says_where_its_rank_ends(pair: zoo.Pair) -> None:
    config = LoxConfig(r=4, rank_pattern={"q_proj": 2})
    subspace = SafetySubspace.from_models(pair.aligned_dir, pair.base_dir, config)
    model = load(pair.aligned_dir)
    with pytest.raises(LoxError, match=r"q_proj\.weight: r = 4 against 2"):
        apply_lox(model, LoxConfig(r=4), base_model=subspace)
    apply_lox(model, config, base_model=subspace)  # control
    assert len(repr(subspace)) < 300


def test_a_subspace_on_another_model_warns(pair: zoo.Pair, tmp_path: Path) -> None:
    subspace = SafetySubspace.from_models(pair.aligned_dir, pair.base_dir, LoxConfig(r=4))
    with pytest.warns(UserWarning, match="make sure"):
        apply_lox(load(pair.base_dir), LoxConfig(r=4), base_model=subspace)


@pytest.mark.parametrize("wrong", ["a/folder", None, 3])
def test_what_is_no_model_is_refused(wrong: object) -> None:
    with pytest.raises(ConfigError, match="harden_checkpoint"):
        apply_lox(wrong, LoxConfig(r=2))


@pytest.fixture
def wide_pair() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A base and an aligned layer of many directions, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(512, 512, generator=generator) for _ in range(2)]
    base, aligned = (torch.nn.Linear(512, 512, bias=False, dtype=torch.bfloat16) for _ in range(2))
    base.weight.data.copy_(drawn[0])
    aligned.weight.data.copy_(drawn[0] + 0.1 * drawn[1])
    return base, aligned


def test_the_way_back_does_not_depend_on_how_products_are_rounded(
    wide_pair: tuple[torch.nn.Module, torch.nn.Module],
) -> None:
    """Training scripts let float32 products be rounded: what was added has to be taken off as it was added."""
    base, aligned = wide_pair
    before = aligned.weight.detach().clone()
    set_before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        apply_lox(aligned, LoxConfig(r=256), base_model=base)
        assert not torch.equal(aligned.weight, before)  # control
        revert_lox(aligned)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(set_before)
    assert torch.equal(aligned.weight, before)


@pytest.mark.parametrize("default", [torch.device("meta"), torch.bfloat16])
def test_defaults_of_the_process_change_nothing(
    default: torch.device | torch.dtype, wide_pair: tuple[torch.nn.Module, torch.nn.Module]
) -> None:
    base, aligned = wide_pair
    expected = apply_lox(copy.deepcopy(aligned), LoxConfig(r=6), base_model=base).weight
    dtype_before = torch.get_default_dtype()
    try:
        if isinstance(default, torch.dtype):
            torch.set_default_dtype(default)
        else:
            torch.set_default_device(default)
        found = apply_lox(aligned, LoxConfig(r=6), base_model=base).weight
    finally:
        torch.set_default_dtype(dtype_before)
        torch.set_default_device(None)
    assert torch.equal(found, expected)
