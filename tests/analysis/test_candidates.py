"""The grid: which weights a word means on models of every kind, names, strength, and grids that cannot be meant."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import zoo
from lox_hf import LoxConfig
from lox_hf.analysis.candidates import Trial, delta_norms, make_trials, strength
from lox_hf.errors import ConfigError, PairingError
from lox_hf.inputs import open_pair
from lox_hf.subspace import SafetySubspace
from lox_hf.weights.live import live_tensors
from lox_hf.weights.source import DictSource

ENDS = {"llama": {"model.embed_tokens", "lm_head"}, "gpt2": {"transformer.wte", "transformer.wpe"}}


def trials(model: nn.Module, *, rs=(2,), alphas=(1.0,), targets=("all",), config=None) -> list[Trial]:
    return make_trials(model, DictSource(live_tensors(model), "it").infos(), rs, alphas, targets, config)


def edited(trial: Trial) -> set[str]:
    return {plan.name.removesuffix(".weight") for plan in trial.plans if plan.edit}


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_words_mean_the_same_on_every_kind(kind: str) -> None:
    words = ["all", "attention", "mlp", "no-embeddings", "all-linear"]
    found = {trial.targets: edited(trial) for trial in trials(zoo.make_model(kind), targets=words)}
    everything = {name for name in found["all"] if name.startswith(("model.", "transformer.", "lm_head"))}
    ends = ENDS.get(kind, {"model.embed_tokens", "lm_head"}) & everything
    assert found["all"] == everything and ends
    assert found["no-embeddings"] == everything - ends
    assert all("attn" in name for name in found["attention"]) and len(found["attention"]) >= 4
    # Both are parts of the layers, and there is nothing else in them.
    assert found["attention"] | found["mlp"] == found["no-embeddings"]
    assert not found["attention"] & found["mlp"]
    assert found["attention"] <= found["all-linear"] <= found["no-embeddings"]


@pytest.mark.parametrize("kind", zoo.TIED_KINDS)
def test_a_tied_head_is_left_alone_wherever_the_file_has_it(kind: str, tmp_path: Path) -> None:
    (trial,) = trials(zoo.make_model(kind), targets=["no-embeddings"])
    assert "lm_head" in trial.config.exclude_modules
    pair = zoo.save_pair(kind, tmp_path)
    plans = open_pair(pair.aligned_dir, pair.base_dir, trial.config).plans  # the settings fit the files too
    assert {plan.name for plan in plans if plan.edit} == {plan.name for plan in trial.plans if plan.edit}


def test_names_and_order() -> None:
    model = zoo.make_model("llama")
    found = trials(model, rs=(2, 0.5, None, 2), alphas=(0.25, 1), targets=["all", "q_proj", ["k_proj", "v_proj"]])
    assert [trial.name for trial in found[:6]] == [
        "r=2 alpha=0.25 all",
        "r=2 alpha=1 all",
        "r=0.5 alpha=0.25 all",
        "r=0.5 alpha=1 all",
        "r=full alpha=0.25 all",
        "r=full alpha=1 all",
    ]
    assert len(found) == len({trial.name for trial in found}) == len({trial.file_name for trial in found}) == 18
    assert edited(found[6]) == {f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)}
    assert found[-1].targets == "k_proj,v_proj" and found[-1].config.target_modules == ["k_proj", "v_proj"]


def test_a_share_of_all_is_not_one_direction() -> None:
    one, whole = trials(zoo.make_model("llama"), rs=(1, 1.0))
    assert (one.config.r, type(one.config.r), type(whole.config.r)) == (1, int, float)


def test_expressions_and_what_is_excluded() -> None:
    model = zoo.make_model("llama")
    (by_regex,) = trials(model, targets=[r".*\.0\..*(up|down)_proj"])
    assert edited(by_regex) == {"model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"}
    assert "/" not in by_regex.file_name
    for excluded in (["q_proj"], r".*\.q_proj"):
        (rest,) = trials(model, targets=["no-embeddings"], config=LoxConfig(exclude_modules=excluded))
        (without,) = trials(model, targets=["no-embeddings"])
        assert edited(without) - edited(rest) == {f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)}


def test_a_file_is_of_its_settings_and_not_of_where_the_base_lies() -> None:
    model = zoo.make_model("llama")
    names = [trials(model, config=LoxConfig(base))[0].file_name for base in ("here", "there")]
    assert names[0] == names[1] != trials(model, config=LoxConfig(seed=1))[0].file_name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alphas": [0.0, 1.0]}, "alpha = 0 is the aligned model itself"),
        ({"alphas": [-1.0]}, "takes alignment away"),
        ({"alphas": [float("nan")]}, "alpha must be a finite number"),
        ({"alphas": []}, "alphas is empty"),
        ({"rs": [0]}, "r must be a positive int"),
        ({"rs": [0, 1.5], "alphas": [0.0]}, "alpha = 0 .*; r must be .* got 0.*; r must be .* got 1.5"),
        ({"rs": [1000]}, "r exceeds the smaller side"),
        ({"targets": ["nowhere"]}, "'nowhere' matches no module"),
        ({"targets": ["["]}, "not a regular expression"),
    ],
)
def test_a_grid_that_cannot_be_meant(changes: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        trials(zoo.make_model("llama"), **changes)


def test_no_embeddings_needs_some() -> None:
    with pytest.raises(ConfigError, match=re.escape("Linear has no embeddings; use 'all'")):
        trials(nn.Linear(4, 4, bias=False), targets=["no-embeddings"])


def test_strength_is_the_norm_of_what_is_added(tmp_path: Path) -> None:
    files = zoo.save_pair("mixtral", tmp_path, dtype=torch.float32)
    aligned, base = files.aligned(), files.base()
    deltas = {name: aligned[name] - base[name] for name in aligned if aligned[name].ndim > 1}
    whole = torch.cat([delta.flatten() for delta in deltas.values()]).norm().item()
    pair = open_pair(files.aligned_dir, files.base_dir, LoxConfig(r=3))
    norms, subspace = delta_norms(pair), SafetySubspace.from_pair(pair, progressbar=False)
    assert norms == pytest.approx({name: delta.norm().item() for name, delta in deltas.items()}, rel=1e-5)
    model = zoo.make_model("mixtral")
    for trial in trials(model, rs=(1, 3), alphas=(0.5, 2.0), targets=["all", "attention"]):
        squares = [
            torch.linalg.svdvals(deltas[plan.name])[: trial.config.r].square().sum()
            for plan in trial.plans
            if plan.edit
        ]
        expected = trial.config.alpha * sum(squares).sqrt().item() / whole
        assert strength(trial.plans, subspace, norms) == pytest.approx(expected, rel=1e-4)
    (full,) = trials(model, rs=[None], alphas=[0.75])
    assert strength(full.plans, None, norms) == pytest.approx(0.75)


def test_equal_models_have_nothing_to_extrapolate() -> None:
    model = zoo.make_model("llama")
    with pytest.raises(PairingError, match="equal in every matrix"):
        delta_norms(open_pair(model, model, LoxConfig()))
