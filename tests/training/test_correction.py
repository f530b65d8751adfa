"""Re-application on weights that are a known way off: what comes back, what is left alone, and how exactly."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import zoo
from drift_oracle import erase, fine_tune
from lox_hf import LoxConfig, NumericsError, PairingError, SafetySubspace, apply_lox
from lox_hf.training.backends import open_weights
from lox_hf.training.correction import reapply, start_coordinates, targets

R = 2  # the zoo's spectra have a gap after the second direction
EXACT = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
"""Largest error of retention after one correction. The zoo is hard on bfloat16: its directions are made of signs, so
one change has four values only, and all entries that get the same one are rounded to the same side."""
DTYPES = pytest.mark.parametrize("dtype", EXACT, ids=["float32", "bfloat16"])
KNOWN_SHARE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}  # what is read; rounding moves the component itself


class Case:
    """A pair of the zoo in memory with its subspace."""

    def __init__(self, kind: str = "llama", dtype: torch.dtype = torch.float32) -> None:
        self.kind, self.dtype = kind, dtype
        self.base, self.aligned = zoo.make_tensors(kind, dtype=dtype)
        config = LoxConfig(r=R)
        self.subspace = SafetySubspace.from_models(self.aligned, self.base, config, progressbar=False)

    def model(self, tensors: dict[str, torch.Tensor] | None = None) -> PreTrainedModel:
        """The aligned model, or the same one with other weights by checkpoint name."""
        config = zoo.make_config(self.kind)
        state = {name: tensor.clone() for name, tensor in (tensors or self.aligned).items()}  # loading does not copy
        return type(zoo.make_model(self.kind)).from_pretrained(None, config=config, state_dict=state, dtype=self.dtype)

    def retention(self, model: nn.Module) -> float:
        """The definition, over all matrices: <C, S> / ||S||^2."""
        found = start_coordinates(open_weights(model), self.subspace)
        s = {name: self.subspace.factors[name].S.double() for name in found}
        component = sum((found[name].diag() @ s[name]).item() for name in found)
        return component / sum(s[name].square().sum().item() for name in found)

    def reapply(self, model: nn.Module, strength: float | None = 1.0) -> float:
        weights = open_weights(model)
        goal = targets(self.subspace, strength, start_coordinates(weights, self.subspace))
        return reapply(weights, self.subspace, goal)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@DTYPES
def test_an_erased_share_is_read_and_brought_back(share: float, dtype: torch.dtype) -> None:
    case = Case(dtype=dtype)
    model = case.model(erase(case.aligned, case.base, R, share))
    assert case.retention(model) == pytest.approx(1 - share, abs=KNOWN_SHARE[dtype])
    assert case.reapply(model) == pytest.approx(share, abs=KNOWN_SHARE[dtype])
    assert case.retention(model) == pytest.approx(1, abs=EXACT[dtype])


@DTYPES
@pytest.mark.parametrize("strength", [0.0, 1.5])
def test_a_strength_is_what_is_read_afterwards(strength: float, dtype: torch.dtype) -> None:
    case = Case(dtype=dtype)
    model = case.model()
    assert case.reapply(model, strength) == pytest.approx(abs(strength - 1), abs=KNOWN_SHARE[dtype])
    assert case.retention(model) == pytest.approx(strength, abs=EXACT[dtype])


def test_strength_one_plus_alpha_makes_the_hardened_model() -> None:
    case = Case()
    hardened = apply_lox(case.model(), LoxConfig(r=R, alpha=0.5), base_model=case.subspace)
    corrected = case.model()
    case.reapply(corrected, 1.5)
    expected, found = hardened.state_dict(), corrected.state_dict()
    assert max((found[name] - expected[name]).abs().max().item() for name in found) < 1e-6
    assert not zoo.same_bits(found, case.model().state_dict())  # control


def test_twice_is_once() -> None:
    case = Case()
    model = case.model(fine_tune(case.aligned, case.base))
    assert case.reapply(model) > 0.4
    after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert case.reapply(model) == 0
    assert zoo.same_bits(model.state_dict(), after)


def test_twice_in_bfloat16_only_comes_closer() -> None:
    case = Case(dtype=torch.bfloat16)
    model = case.model(fine_tune(case.aligned, case.base))
    first = case.reapply(model)
    away = abs(case.retention(model) - 1)
    assert 0 < case.reapply(model) < 0.1 * first, "what rounding has left is little of it"
    assert abs(case.retention(model) - 1) <= away


def test_the_start_itself_is_restored_and_only_within_the_directions() -> None:
    case = Case()
    model = case.model(fine_tune(case.aligned, case.base, seed=3))
    weights = open_weights(model)
    start = start_coordinates(weights, case.subspace)
    goal = targets(case.subspace, None, start)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    case.reapply(model, 1.5)
    assert reapply(weights, case.subspace, goal) > 0.4  # control: it had been moved
    found = start_coordinates(weights, case.subspace)
    assert all(torch.allclose(found[name], start[name], atol=1e-6) for name in start)
    assert max((before[name] - tensor).abs().max().item() for name, tensor in model.state_dict().items()) < 1e-6
    assert goal.keys() == case.subspace.factors.keys()


def test_drift_outside_the_directions_is_left_alone() -> None:
    case = Case()
    tuned = fine_tune(case.aligned, case.base)
    model = case.model(tuned)
    name = "model.layers.0.mlp.up_proj.weight"
    case.reapply(model)
    moved = model.state_dict()[name].double() - tuned[name].double()
    u, vh = case.subspace.factors[name].U.double(), case.subspace.factors[name].Vh.double()
    assert (moved - u @ (u.T @ moved @ vh.T) @ vh).norm() < 1e-5 * moved.norm()
    assert moved.norm() > 1e-3


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "granitemoe"])
def test_stacks_of_experts(kind: str) -> None:
    case = Case(kind)
    model = case.model(erase(case.aligned, case.base, R, 0.5))
    assert case.retention(model) == pytest.approx(0.5, abs=KNOWN_SHARE[torch.float32])
    case.reapply(model)
    assert case.retention(model) == pytest.approx(1, abs=EXACT[torch.float32])
    live = zoo.revert_weight_conversion(model, dict(model.state_dict()))
    expert = next(name for name in live if ("experts" in name or live[name].ndim == 3) and live[name].ndim > 1)
    assert torch.allclose(live[expert], case.aligned[expert], atol=1e-5)


@pytest.mark.parametrize("kind", ["llama_tied", "qwen3", "gpt2"])
def test_tied_weights_are_corrected_once(kind: str) -> None:
    case = Case(kind)
    model = case.model(erase(case.aligned, case.base, R, 1.0))
    case.reapply(model)
    assert case.retention(model) == pytest.approx(1, abs=EXACT[torch.float32])
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert head.data_ptr() == embedding.data_ptr()
    stored = "transformer.wte.weight" if kind == "gpt2" else "model.embed_tokens.weight"
    assert torch.allclose(embedding, case.aligned[stored], atol=1e-5)


def test_what_has_not_moved_stays_bit_identical() -> None:
    case = Case()
    tuned = fine_tune(case.aligned, case.base)
    frozen = [name for name in tuned if "layers.0." in name]
    model = case.model({**tuned, **{name: case.aligned[name] for name in frozen}})
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert case.reapply(model) > 0
    after = model.state_dict()
    same = {name for name in after if torch.equal(after[name], before[name])}
    assert same == {*frozen, *(name for name in after if after[name].ndim < 2)}


def test_the_aligned_model_needs_nothing() -> None:
    case = Case(dtype=torch.bfloat16)
    model = case.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert case.reapply(model) == 0
    assert zoo.same_bits(model.state_dict(), before)
    assert case.reapply(model, 1.01) > 0  # control


@pytest.mark.parametrize("where", ["weight", "target"])
def test_numbers_that_are_not_finite_are_named_and_nothing_is_changed(where: str) -> None:
    case = Case()
    model = case.model(fine_tune(case.aligned, case.base))
    weights = open_weights(model)
    goal = targets(case.subspace, 1.0, start_coordinates(weights, case.subspace))
    name = list(goal)[-1]
    if where == "weight":
        with torch.no_grad():
            weights.get(name)[0, 0] = float("nan")
    else:
        goal[name] = goal[name] * float("inf")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(NumericsError, match=name.replace(".", r"\.")):
        reapply(weights, case.subspace, goal)
    assert zoo.same_bits(model.state_dict(), before)


def test_a_model_that_does_not_fit_is_refused_with_all_mismatches() -> None:
    case = Case()
    linear = nn.Module()
    linear.add_module("lm_head", nn.Linear(3, 2, bias=False))
    with pytest.raises(PairingError) as error:
        start_coordinates(open_weights(linear), case.subspace)
    assert "lm_head.weight: (2, 3) against (192, 96)" in str(error.value)
    assert "model.layers.1.mlp.up_proj.weight: only in the subspace" in str(error.value)
