"""`LoxConfig` validates itself, and configs and records survive the way to disk and back."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lox_hf import (
    CheckpointError,
    ConfigError,
    HardeningPlan,
    HardeningReport,
    LoxConfig,
    ModelReference,
    TensorPlan,
    TensorReport,
)

FULL: dict[str, Any] = {
    "base_model_name_or_path": "org/base",
    "revision": "main",
    "r": 0.9,
    "alpha": 0.5,
    "target_modules": ["q_proj"],
    "exclude_modules": r".*head",
    "layers_to_transform": [0, 1],
    "layers_pattern": "layers",
    "rank_pattern": {"q_proj": 3, "v_proj": None},
    "alpha_pattern": {"q_proj": 0.25},
    "svd": "exact",
    "svd_tol": 1e-3,
    "seed": 7,
    "cast_base": True,
    "allow_negative_alpha": True,
}


@pytest.mark.parametrize("r", [1, 6, 4096, 0.01, 0.9, 1.0, None])
def test_good_ranks(r: int | float | None) -> None:
    assert LoxConfig(r=r).r == r


@pytest.mark.parametrize("r", [0, -1, 0.0, 1.5, 6.0, math.nan, math.inf, True, "6", [6]])
def test_bad_ranks(r: Any) -> None:
    with pytest.raises(ConfigError, match=r"^Invalid LoxConfig: r must be a positive int, .* or None"):
        LoxConfig(r=r)
    with pytest.raises(ConfigError, match=r"rank_pattern\['q_proj'\] must be"):
        LoxConfig(rank_pattern={"q_proj": r})


@pytest.mark.parametrize("alpha", [math.nan, math.inf, "1", None, True])
def test_bad_alphas(alpha: Any) -> None:
    with pytest.raises(ConfigError, match="alpha must be a finite number"):
        LoxConfig(alpha=alpha)


@pytest.mark.parametrize("settings", [{"alpha": -0.5}, {"alpha_pattern": {"q_proj": -0.5}}], ids=str)
def test_a_negative_alpha_needs_the_flag(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"-0.5 takes alignment away .* allow_negative_alpha=True"):
        LoxConfig(**settings)
    assert LoxConfig(**settings, allow_negative_alpha=True).allow_negative_alpha


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"svd": "qr"}, "svd must be 'auto' or 'exact'"),
        ({"svd_tol": 0}, r"svd_tol must lie in \(0, 1\)"),
        ({"svd_tol": "x"}, "svd_tol must lie"),
        ({"seed": 1.5}, "seed must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**64}, "seed must be"),
        ({"target_modules": "("}, r"'\(' is not a regular expression"),
        ({"exclude_modules": "["}, "is not a regular expression"),
        ({"rank_pattern": {"*": 3}}, "is not a regular expression"),
        ({"exclude_modules": "all-linear"}, "not 'all-linear'"),
        ({"layers_pattern": "h"}, "layers_pattern needs layers_to_transform"),
        ({"target_modules": ".*", "layers_to_transform": 1}, "need a list in target_modules"),
        ({"target_modules": 5}, "target_modules must be"),
        ({"exclude_modules": [5]}, "exclude_modules must be"),
        ({"layers_pattern": 5, "layers_to_transform": 1}, "layers_pattern must be"),
        ({"layers_to_transform": "1"}, "layers_to_transform must be"),
        ({"rank_pattern": "q_proj"}, "rank_pattern must be"),
        ({"alpha_pattern": [1.0]}, "alpha_pattern must be"),
    ],
    ids=str,
)
def test_other_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoxConfig(**settings)


def test_layers_go_with_all_linear_and_with_a_list() -> None:
    """Control of the refusal beside a regular expression."""
    assert LoxConfig(target_modules="all-linear", layers_to_transform=1).layers_to_transform == 1
    assert LoxConfig(target_modules=["q_proj"], layers_to_transform=[1]).layers_to_transform == [1]


def test_all_problems_are_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        LoxConfig(r=0, alpha=-1.0, svd="qr", svd_tol=2.0, layers_pattern="h", target_modules="(")
    for part in (
        "r must be",
        "alpha = -1.0",
        "svd must be",
        "svd_tol must",
        "layers_pattern needs",
        "regular expression",
    ):
        assert part in str(caught.value), part
    assert isinstance(caught.value, ValueError)


def test_the_dict_and_the_file_give_the_config_back(tmp_path: Path) -> None:
    for config in (LoxConfig(), LoxConfig(r=None), LoxConfig(**FULL)):
        assert LoxConfig.from_dict(config.to_dict()) == config
        path = config.save_pretrained(tmp_path / "new" / "folder")
        assert path.name == "lox_config.json"
        assert LoxConfig.from_pretrained(path.parent) == LoxConfig.from_pretrained(str(path.parent)) == config
    assert set(FULL) == set(LoxConfig().to_dict())  # every setting went through


def test_sets_tuples_and_paths_become_what_json_holds(tmp_path: Path) -> None:
    config = LoxConfig(tmp_path, target_modules={"b", "a"}, layers_to_transform=range(3))
    assert (config.base_model_name_or_path, config.target_modules, config.layers_to_transform) == (
        str(tmp_path),
        ["a", "b"],
        [0, 1, 2],
    )
    config.save_pretrained(tmp_path)
    assert LoxConfig.from_pretrained(tmp_path) == config


def test_unknown_settings_are_named_beside_the_known(tmp_path: Path) -> None:
    (tmp_path / "lox_config.json").write_text(json.dumps({"r": 6, "coef": 1.0, "k": 2}))
    with pytest.raises(ConfigError, match=r"Unknown LoxConfig settings \['coef', 'k'\].*'alpha'"):
        LoxConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"not json", b"\xff\xfe", b"[1, 2]", b"null", b""], ids=str)
def test_a_file_that_is_no_json_object(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "lox_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"Cannot read .*lox_config\.json"):
        LoxConfig.from_pretrained(tmp_path)


def test_a_stored_value_that_is_invalid(tmp_path: Path) -> None:
    (tmp_path / "lox_config.json").write_text('{"alpha": -1}')
    with pytest.raises(ConfigError, match="alpha = -1"):
        LoxConfig.from_pretrained(tmp_path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is no folder .*nowhere"):
        LoxConfig.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"has no lox_config.json; it holds \['other.txt'\]"):
        LoxConfig.from_pretrained(tmp_path)


def make_report(**changes: Any) -> HardeningReport:
    tensor = TensorReport(
        name="model.layers.0.q_proj.weight",
        shape=(8, 4),
        dtype="bfloat16",
        alpha=1.25,
        rank=2,
        method="lanczos",
        energy_share=0.5,
        delta_norm=2.0,
        singular_values=(1.0, 0.5),
        residual=1e-6,
        gap=0.1,
        projector_bound=1e-5,
        steps=3,
        seconds=0.25,
    )
    zero = TensorReport("lm_head.weight", (8, 4), "bfloat16", 1.25, 0, "zero", delta_norm=0.0)
    report = HardeningReport(
        aligned=ModelReference("org/aligned", "abc"),
        base=ModelReference("org/base"),
        config=LoxConfig(**FULL).to_dict(),
        tensors=(tensor, zero),
        copied=3,
        output="out",
        seconds=1.5,
        versions={"torch": "2"},
        warnings=("a near tie",),
    )
    return replace(report, **changes)


@pytest.mark.parametrize("changes", [{}, {"base": None, "warnings": ()}, {"tensors": ()}], ids=str)
def test_a_report_survives_json(changes: dict[str, Any]) -> None:
    report = make_report(**changes)
    back = HardeningReport.from_json(report.to_json())
    assert same(back.to_dict(), report.to_dict())
    assert all(
        isinstance(tensor.shape, tuple) and isinstance(tensor.singular_values, tuple) for tensor in back.tensors
    )
    assert HardeningReport.from_json(report.to_json()).to_json() == report.to_json()


def test_nan_is_null_in_the_file_and_nan_again_in_the_record() -> None:
    text = make_report().to_json()
    data = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not strict JSON"))
    assert data["tensors"][1]["gap"] is None and data["tensors"][0]["gap"] == 0.1
    back = HardeningReport.from_json(text)
    assert math.isnan(back.tensors[1].gap) and math.isnan(back.tensors[1].energy_share)
    assert back.base == ModelReference("org/base", None)


def test_infinity_survives_json() -> None:
    report = TensorReport("w", (2, 2), "float32", 1.0, 1, "lanczos", projector_bound=math.inf)
    assert TensorReport.from_json(report.to_json()).projector_bound == math.inf


def test_the_defaults_are_the_papers_main_setting() -> None:
    assert (LoxConfig().r, LoxConfig().alpha, LoxConfig().target_modules) == (6, 1.25, None)


def test_a_report_of_a_newer_version_is_read() -> None:
    data = {**make_report().to_dict(), "invented_later": 1}
    assert same(HardeningReport.from_dict(data).to_dict(), make_report().to_dict())


def test_the_totals_of_a_report() -> None:
    report = make_report()
    assert report.energy_share == 0.5  # the zero matrix has none
    assert math.isnan(make_report(tensors=()).energy_share)


def test_a_plan_survives_json() -> None:
    plan = HardeningPlan(
        aligned=ModelReference("org/aligned", "abc"),
        base=ModelReference("org/base"),
        base_found_in="README.md",
        tensors=(
            TensorPlan("a.weight", (8, 4), "bfloat16", None, 1.25, True, "target"),
            TensorPlan("b", (2, 8, 4), "bfloat16", 0.9, 1.25, True, "target"),
        ),
        total_bytes=10,
        files=("tokenizer.json",),
        left_out=("old.bin",),
        warnings=("a warning",),
    )
    for item in (plan, replace(plan, base=None)):
        assert HardeningPlan.from_json(item.to_json()) == item
    assert [tensor.name for tensor in HardeningPlan.from_json(plan.to_json()).edited] == ["a.weight", "b"]


def same(left: Any, right: Any) -> bool:
    """Equality in which NaN equals NaN."""
    return repr(left) == repr(right)
