"""Points depend on how a model is loaded, and files may hold a tied weight twice: all three analyses on both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

import zoo
from lox_hf.analysis.landscape import landscape
from lox_hf.analysis.rank_curve import rank_curve
from lox_hf.analysis.select import select
from lox_hf.errors import OutputError
from lox_hf.records import Limit

Analysis = Callable[..., Any]


def size(model: nn.Module) -> float:
    return sum(weight.double().abs().sum().item() for weight in model.parameters())


def curve(model: nn.Module, pair: zoo.Pair, **given: Any) -> Any:
    return rank_curve(model, pair.base_dir, size, ranks=(0, 1), aligned_model=pair.aligned_dir, **given)


def selection(model: nn.Module, pair: zoo.Pair, **given: Any) -> Any:
    grid: dict[str, Any] = {"rs": (1,), "alphas": (0.5,), "limits": [Limit("value", 1e9)]}
    return select(model, pair.base_dir, size, **grid, aligned_model=pair.aligned_dir, **given)


def plane(model: nn.Module, pair: zoo.Pair, **given: Any) -> Any:
    return landscape(model, [pair.aligned_dir, pair.base_dir], size, grid=(2, 2), measure="value", **given)


def save(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Put other weights into a checkpoint, in one file."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


ANALYSES = pytest.mark.parametrize("analysis", [curve, selection, plane])


def test_models_in_the_memory_of_the_loaded_one(tmp_path: Path) -> None:
    """A change to a model's own state dict shares all but the change with it, which is overwritten at every point."""
    pair = zoo.save_pair("llama", tmp_path, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(pair.aligned_dir)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    changed = {**model.state_dict(), "lm_head.weight": 3 * before["lm_head.weight"]}
    given = {"score_fn": size, "grid": (4, 2), "measure": "value"}
    found = landscape(model, [model, changed], **given)
    apart = landscape(model, [before, {name: weight.clone() for name, weight in changed.items()}], **given)
    assert [item.score for item in found.models] == [item.score for item in apart.models]
    assert found.points == apart.points and found.models[0].score != found.models[1].score
    curve_of = {"ranks": (0, 1), "base_model": pair.base_dir, "score_fn": size}
    assert rank_curve(model, aligned_model=model, **curve_of).points == rank_curve(model, **curve_of).points
    assert zoo.same_bits(dict(model.state_dict()), before)


@pytest.mark.parametrize("from_files", [True, False])
def test_an_attack_does_not_reach_a_base_in_the_same_memory(from_files: bool, tmp_path: Path) -> None:
    pair = zoo.save_pair("llama", tmp_path, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(pair.aligned_dir)
    name = "model.layers.0.mlp.up_proj.weight"
    base = {**model.state_dict(), name: pair.base()[name]}

    def attack(model: nn.Module) -> float:
        found = size(model)
        with torch.no_grad():
            for weight in model.parameters():
                weight.fill_(1e6)
        return found

    grid: dict[str, Any] = {"rs": (1, None), "alphas": (0.5, 1.0), "limits": [Limit("value", 1e9)]}
    found = select(model, base, size, attack_fn=attack, **grid, aligned_model=pair.aligned_dir if from_files else None)
    assert len(found.candidates) == 4
    for item in found.candidates:
        assert item.attacked == item.score  # measured before the attack acts, so formed as without one


@ANALYSES
def test_points_in_another_dtype_are_not_taken(analysis: Analysis, tmp_path: Path) -> None:
    pair = zoo.save_pair("llama", tmp_path, dtype=torch.float32)
    models = [AutoModelForCausalLM.from_pretrained(pair.aligned_dir, dtype=dtype) for dtype in (None, torch.bfloat16)]
    analysis(models[0], pair, output_dir=tmp_path / "run")
    with pytest.raises(OutputError, match=r"dtype: 'float32' there, 'bfloat16' now"):
        analysis(models[1], pair, output_dir=tmp_path / "run")
    analysis(models[0], pair, output_dir=tmp_path / "run")  # control


@ANALYSES
def test_a_base_that_was_trained_on_is_named(analysis: Analysis, tmp_path: Path) -> None:
    pair = zoo.save_pair("llama", tmp_path, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(pair.aligned_dir)
    analysis(model, pair, output_dir=tmp_path / "run")
    save(pair.base_dir, {name: 1.5 * weight for name, weight in pair.base().items()})
    with pytest.raises(OutputError, match=r"the weights of (base|m2) have changed since, or are of another model"):
        analysis(model, pair, output_dir=tmp_path / "run")


@ANALYSES
def test_files_that_hold_a_tied_head_once_more(analysis: Analysis, tmp_path: Path) -> None:
    pair = zoo.save_pair("llama_tied", tmp_path, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(pair.aligned_dir)
    expected = analysis(model, pair)
    for folder, weights in ((pair.aligned_dir, pair.aligned()), (pair.base_dir, pair.base())):
        assert "lm_head.weight" not in weights  # control
        save(folder, {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    assert analysis(model, pair) == expected
