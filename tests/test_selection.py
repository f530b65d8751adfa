"""Which tensors are edited: PEFT's own rules on checkpoint names, and the rules for ranks and shapes."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import get_pattern_key

import zoo
from lox_hf import ConfigError, LoxConfig, TensorPlan, UnsupportedModelError, plan_hardening
from lox_hf.weights.live import checkpoint_names, linear_modules, meta_model
from lox_hf.weights.selection import get_pattern_value, matrix_shape, select
from lox_hf.weights.source import TensorInfo

MODULES = (
    "lm_head",
    "q_proj",
    "model.embed_tokens",
    "model.my_q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.0.mlp.experts.1.w1",
    "model.layers.1.mlp.experts.0.w1",
    "model.layers.1.mlp.experts.11.w1",
    "model.layers.1.mlp.experts.gate_up_proj",
    "transformer.h.0.attn.c_attn",
    "transformer.h.1.attn.c_attn",
    "encoder.block.1.layer.0.SelfAttention.q",
    "encoder.block.0.layer.1.SelfAttention.q",
    "language_model.model.layers.1.self_attn.q_proj",
    "visual.blocks.1.attn.q_proj",
)
SETTINGS: tuple[dict[str, Any], ...] = (
    {"target_modules": ["q_proj"]},
    {"target_modules": ["proj"]},
    {"target_modules": ["self_attn.q_proj", "w1"]},
    {"target_modules": ["model.layers.1.self_attn.q_proj"]},
    {"target_modules": ["lm_head", "embed_tokens"]},
    {"target_modules": r".*\.q_proj"},
    {"target_modules": r"q_proj"},
    {"target_modules": r"model\.layers\.(0|1)\..*"},
    {"target_modules": r".*experts\.\d\.w1"},
    {"target_modules": ["q_proj", "w1"], "exclude_modules": ["self_attn.q_proj"]},
    {"target_modules": ["q_proj", "w1"], "exclude_modules": r".*layers\.1\..*"},
    {"target_modules": ["q_proj", "w1"], "exclude_modules": r"model\..*"},
    {"target_modules": r".*", "exclude_modules": ["lm_head"]},
    {"target_modules": ["q_proj", "w1"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "w1", "q"], "layers_to_transform": [0, 11]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["c_attn", "q_proj"], "layers_to_transform": 1, "layers_pattern": "h"},
    {"target_modules": ["c_attn", "q_proj", "q"], "layers_to_transform": 1, "layers_pattern": ["blocks", "layers"]},
    {"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "layer"},
    {"target_modules": ["w1", "q_proj"], "layers_to_transform": 1, "layers_pattern": "experts"},
    {"target_modules": ["w1", "q_proj"], "layers_to_transform": [1], "layers_pattern": []},
    {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": 1},
)
RANK_KEYS = (
    "q_proj",
    "self_attn.q_proj",
    r".*\.1\..*",
    "model.layers.1.self_attn.q_proj",
    "proj",
    "w1|v_proj",
    "experts",
)


def plans_of(settings: dict[str, Any], modules: tuple[str, ...] = MODULES) -> list[TensorPlan]:
    infos = {f"{module}.weight": TensorInfo((8, 8), torch.float32, "float32") for module in modules}
    return select(infos, LoxConfig(r=1, **settings))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_modules_match_as_in_peft(settings: dict[str, Any]) -> None:
    ours = (
        {plan.name.removesuffix(".weight") for plan in plans_of(settings) if plan.edit}
        if _selects(settings)
        else set()
    )
    theirs = {module for module in MODULES if check_target_module_exists(LoraConfig(**settings), module)}
    assert ours == theirs


def _selects(settings: dict[str, Any]) -> bool:
    """Where PEFT takes nothing, ours must refuse and say so."""
    if any(check_target_module_exists(LoraConfig(**settings), module) for module in MODULES):
        return True
    with pytest.raises(ConfigError, match=r"matches no module|select no tensor"):
        plans_of(settings)
    return False


def test_the_table_tells_modules_apart() -> None:
    """Control: the settings above select different sets, none of them everything."""
    found = {
        frozenset(module for module in MODULES if check_target_module_exists(LoraConfig(**settings), module))
        for settings in SETTINGS
    }
    assert len(found) >= 15
    assert frozenset(MODULES) not in found


def test_layers_without_a_prefix_have_numbers_too() -> None:
    """GPT-2's own files name layers `h.0...`, where PEFT sees no layer number, as it matches loaded names only."""
    modules = ("h.0.attn.c_attn", "h.1.attn.c_attn")
    plans = plans_of({"target_modules": ["c_attn"], "layers_to_transform": 1}, modules)
    assert [plan.edit for plan in plans] == [False, True]


@pytest.mark.parametrize("keys", [RANK_KEYS, RANK_KEYS[::-1], (RANK_KEYS[2],)], ids=["there", "back", "one"])
def test_rank_and_alpha_patterns_match_as_in_peft(keys: tuple[str, ...]) -> None:
    pattern = {key: number for number, key in enumerate(keys, start=2)}
    for module in MODULES:
        expected = pattern.get(get_pattern_key(list(pattern), module), 1)
        assert get_pattern_value(pattern, module, 1) == expected, module
    if len(keys) == 1:
        plans = plans_of({"rank_pattern": {keys[0]: 3}, "alpha_pattern": {keys[0]: 0.5}})
        hit = {module for module in MODULES if re.fullmatch(keys[0], module)}
        assert 0 < len(hit) < len(MODULES)
        assert {(p.name.removesuffix(".weight") in hit, p.r, p.alpha) for p in plans} == {
            (True, 3, 0.5),
            (False, 1, 1.25),
        }


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_all_linear_is_pefts_in_checkpoint_names(kind: str, tmp_path: Path) -> None:
    pair = zoo.save_pair(kind, tmp_path)
    model = zoo.make_model(kind)
    live = _maybe_include_all_linear_layers(LoraConfig(target_modules="all-linear"), model).target_modules
    stored = {name.removesuffix(".weight"): names for name, names in checkpoint_names(model).items()}
    expected = {name.removesuffix(".weight") for module in live for name in stored[module]}
    assert linear_modules(model) == linear_modules(meta_model(pair.aligned_dir)) == expected != set()
    plan = plan_hardening(pair.aligned_dir, LoxConfig(str(pair.base_dir), r=1, target_modules="all-linear"))
    assert {tensor.name.removesuffix(".weight") for tensor in plan.edited} == expected
    assert {tensor.reason for tensor in plan.tensors if not tensor.edit} <= {
        "not a linear layer",
        "fewer than two dims",
    }


def test_none_takes_every_floating_tensor_with_two_or_more_dims() -> None:
    infos = {
        "a.weight": TensorInfo((8, 8), torch.float16, "float16"),
        "a.bias": TensorInfo((8,), torch.float16, "float16"),
        "scalar": TensorInfo((), torch.float32, "float32"),
        "table": TensorInfo((8, 8), torch.int64, "int64"),
        "experts.w": TensorInfo((2, 16, 16), torch.bfloat16, "bfloat16"),
        "conv.weight": TensorInfo((8, 3, 2, 2), torch.float32, "float32"),
    }
    plans = select(infos, LoxConfig(r=1))
    assert {plan.name: plan.reason for plan in plans if not plan.edit} == {
        "a.bias": "fewer than two dims",
        "scalar": "fewer than two dims",
        "table": "not floating point",
    }
    assert [plan.name for plan in plans] == list(infos)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, None], ids=str)
def test_dtypes_that_cannot_be_edited_are_named(dtype: torch.dtype | None) -> None:
    stored = str(dtype).removeprefix("torch.") if dtype else "F4"
    infos = {"a.weight": TensorInfo((8, 8), dtype, stored), "b.weight": TensorInfo((8, 8), torch.float32, "float32")}
    with pytest.raises(UnsupportedModelError, match=rf"1 selected .* a\.weight: {stored}") as caught:
        select(infos, LoxConfig(r=1))
    assert "exclude_modules" in str(caught.value)
    assert [plan.edit for plan in select(infos, LoxConfig(r=1, exclude_modules=["a"]))] == [False, True]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 7), (1, 5, 7)),
        ((4, 32, 16), (4, 32, 16)),  # a stack of experts
        ((32, 16, 4), (1, 32, 64)),  # a one-dimensional convolution
        ((8, 3, 2, 2), (1, 8, 12)),
        ((8, 3, 2, 2, 2), (1, 8, 24)),
    ],
)
def test_matrix_shape(shape: tuple[int, ...], expected: tuple[int, int, int]) -> None:
    assert matrix_shape(shape) == expected


def infos_of(*shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    return {f"m{number}.weight": TensorInfo(shape, torch.float32, "float32") for number, shape in enumerate(shapes)}


def test_r_over_the_smaller_side_of_all_is_refused_with_every_tensor() -> None:
    with pytest.raises(ConfigError, match=r"m0\.weight: r = 9 .*\(8, 20\); m1\.weight: r = 9 .*\(30, 8\).*r=None"):
        select(infos_of((8, 20), (30, 8)), LoxConfig(r=9))
    assert all(plan.edit for plan in select(infos_of((8, 20), (30, 8)), LoxConfig(r=8)))


def test_r_over_the_smaller_side_of_some_takes_all_of_theirs_and_says_so() -> None:
    narrow, wide = select(infos_of((4, 20), (30, 8)), LoxConfig(r=6))
    assert narrow.edit and "exceeds the smaller side, all 4" in narrow.reason
    assert wide.edit and "exceeds" not in wide.reason


def test_a_rank_asked_for_by_name_must_fit() -> None:
    with pytest.raises(ConfigError, match=r"m1\.weight: r = 9") as caught:
        select(infos_of((20, 20), (30, 8)), LoxConfig(r=6, rank_pattern={"m1": 9}))
    assert "m0" not in str(caught.value)
    assert [plan.r for plan in select(infos_of((20, 20), (30, 8)), LoxConfig(r=6, rank_pattern={"m1": 8}))] == [6, 8]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "nowhere"]},
        {"target_modules": "nowhere"},
        {"exclude_modules": ["nowhere"]},
        {"rank_pattern": {"nowhere": 1}},
        {"alpha_pattern": {"nowhere": 1.0}},
    ],
    ids=str,
)
def test_a_pattern_that_matches_nothing_is_named_beside_names_that_exist(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"'nowhere' matches no module.*named like lm_head; q_proj"):
        plans_of(settings)


def test_settings_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="together select no tensor"):
        plans_of({"target_modules": ["lm_head"], "exclude_modules": ["lm_head"]})
