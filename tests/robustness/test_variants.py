"""The models of the matrix: what they are called, and what an edit makes of the aligned model's weights."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import zoo
from lox_hf import LoxConfig, SafetySubspace
from lox_hf.errors import AlreadyHardenedError, ConfigError, UnsupportedModelError
from lox_hf.robustness.variants import CONTROLS, Variant, edit_weights, make_variants, random_subspace
from lox_hf.weights.live import live_tensors

LOX = LoxConfig(r=4, alpha=1.25)
KINDS = ("llama", "gpt2", "mixtral")


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], zoo.Pair]:
    made: dict[str, zoo.Pair] = {}

    def make(kind: str) -> zoo.Pair:
        if kind not in made:
            made[kind] = zoo.save_pair(kind, tmp_path_factory.mktemp(kind), dtype=torch.float32)
        return made[kind]

    return make


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in live_tensors(model).items()}


def edit_of(pair: zoo.Pair, variant: Variant, **options: Any) -> dict[str, torch.Tensor]:
    """What a variant adds to the aligned weights, float64, where it changes them."""
    model = load(pair.aligned_dir)
    before = tensors(model)
    edit_weights(model, variant, base_model=pair.base_dir, **options)
    added = {name: tensor.double() - before[name].double() for name, tensor in tensors(model).items()}
    return {name: edit for name, edit in added.items() if edit.any()}


def matrices(edit: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stacks of experts matrix by matrix."""
    return {
        f"{name}[{place}]": matrix
        for name, tensor in edit.items()
        for place, matrix in enumerate(tensor if tensor.ndim == 3 else tensor[None])
    }


def names(variants: list[Variant]) -> list[str]:
    return [variant.name for variant in variants]


def test_names_and_order_of_a_whole_matrix() -> None:
    hardened = [LoxConfig(r=2, alpha=0.5), LoxConfig(r=2, alpha=1), LoxConfig(r=0.9, alpha=1.0)]
    assert names(make_variants(hardened, CONTROLS[::-1])) == [
        "aligned",
        "hardened r=2 alpha=0.5",
        "hardened r=2 alpha=1",
        "hardened r=0.9 alpha=1",
        "expo alpha=0.5",
        "expo alpha=1",
        "random r=2 alpha=0.5",
        "random r=2 alpha=1",
        "random r=0.9 alpha=1",
        "refusal-matched r=2 alpha=0.5",
        "refusal-matched r=2 alpha=1",
        "refusal-matched r=0.9 alpha=1",
        "safeinst",
        "rescaled",
        "retrained",
    ]
    assert names(make_variants([LOX], [])) == ["aligned", "hardened r=4 alpha=1.25"]


def test_one_direction_and_all_of_the_energy_have_different_names() -> None:
    one, all_of_it = LoxConfig(r=1), LoxConfig(r=1.0)
    assert one == all_of_it, "Python takes them for the same"
    assert names(make_variants([one, all_of_it], [])) == [
        "aligned",
        "hardened r=1 alpha=1.25",
        "hardened r=1.0 alpha=1.25",
    ]


def test_a_variant_is_plain_data() -> None:
    for variant in make_variants([LOX]):
        assert pickle.loads(pickle.dumps(variant)) == variant
        assert variant.settings()["kind"] == variant.kind
        assert variant.is_trained == (variant.kind in ("refusal-matched", "retrained"))
    assert Variant("hardened", LOX).settings()["r"] == 4
    elsewhere = LoxConfig(r=4, alpha=1.25, base_model_name_or_path="moved", revision="main")
    assert Variant("hardened", elsewhere).settings() == Variant("hardened", LOX).settings()
    assert Variant("hardened", LoxConfig(r=4, alpha=1)).settings() != Variant("hardened", LOX).settings()


@pytest.mark.parametrize(
    ("hardened", "controls", "message"),
    [
        ([LOX], ["randon", "rescaled", "zz"], "Unknown controls: 'randon' Did you mean 'random'\\?; 'zz'[.]"),
        ([LOX], ["hardened"], "Unknown controls: 'hardened'"),
        ([LOX], ["random", "random"], "named twice: 'random'"),
        ([LOX, LoxConfig(r=4, alpha=1.25, target_modules=["q_proj"])], [], "share a name: 'hardened r=4 alpha=1.25'"),
        ([], ["random"], "at least one pair of r and alpha"),
        ([LoxConfig(r=None)], [], "full rank .* is the control 'expo'"),
    ],
    ids=["unknown", "no-control", "twice", "share-a-name", "nothing-hardened", "full-rank"],
)
def test_a_matrix_that_makes_no_sense_is_refused(hardened: list[LoxConfig], controls: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_variants(hardened, controls)


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("hardened", None, "'hardened' of the matrix needs the settings"),
        ("refusal-matched", None, "needs the settings"),
        ("rescaled", LOX, "'rescaled' of the matrix has no use"),
        ("expo", LOX, "r=4"),
        ("random", LoxConfig(r=None), "r=None"),
    ],
    ids=["hardened", "refusal-matched", "rescaled", "expo", "random"],
)
def test_a_variant_that_makes_no_sense_is_refused(kind: Any, config: LoxConfig | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Variant(kind, config)


@pytest.mark.parametrize("kind", ["aligned", "safeinst", "retrained", "refusal-matched"])
def test_models_that_no_edit_makes_are_left_as_they_are(kind: Any, pair_of: Callable[[str], zoo.Pair]) -> None:
    config = LOX if kind == "refusal-matched" else None
    assert edit_of(pair_of("llama"), Variant(kind, config)) == {}
    assert edit_of(pair_of("llama"), Variant("rescaled")), "the control"


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_edit_is_as_large_in_every_matrix(kind: str, pair_of: Callable[[str], zoo.Pair]) -> None:
    pair = pair_of(kind)
    true = matrices(edit_of(pair, Variant("hardened", LOX)))
    random = matrices(edit_of(pair, Variant("random", LOX), seed=1))
    assert true.keys() == random.keys()
    for name, edit in true.items():
        # Edits are differences of float32 weights near 0.1, which are spaced by 7e-9; singular values are over 1e-2.
        assert torch.allclose(torch.linalg.svdvals(edit)[:4], torch.linalg.svdvals(random[name])[:4], atol=1e-5), name
        assert (torch.linalg.svdvals(random[name])[4:] < 1e-5).all(), name
    shares = [overlap(edit, random[name]) for name, edit in true.items()]
    chance = [4 / len(edit) for edit in true.values()]
    assert sum(shares) / sum(chance) == pytest.approx(1, abs=0.3)
    assert all(overlap(edit, edit) > 0.999 for edit in true.values()), "the control"


def overlap(left: torch.Tensor, right: torch.Tensor) -> float:
    """||U^T Q||_F^2 / 4 of the top four left directions: k / m by chance, 1 where they are the same."""
    directions = [torch.linalg.svd(edit).U[:, :4] for edit in (left, right)]
    return (directions[0].T @ directions[1]).square().sum().item() / 4


def test_random_directions_depend_on_the_seed_and_the_matrix_alone(pair_of: Callable[[str], zoo.Pair]) -> None:
    pair = pair_of("llama")
    everything = edit_of(pair, Variant("random", LOX), seed=3)
    again = edit_of(pair, Variant("random", LOX), seed=3)
    other = edit_of(pair, Variant("random", LOX), seed=4)
    part = edit_of(pair, Variant("random", LoxConfig(r=4, alpha=1.25, target_modules=["q_proj"])), seed=3)
    assert len(part) == 2 < len(everything)
    for name, edit in everything.items():
        assert torch.equal(edit, again[name]) and not torch.equal(edit, other[name])
        assert name not in part or torch.equal(edit, part[name])
    one, two = (everything[f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in (0, 1))
    assert overlap(one, two) < 0.5, "layers have directions of their own"


def test_a_random_subspace_has_orthonormal_directions_and_leaves_the_true_ones(
    pair_of: Callable[[str], zoo.Pair],
) -> None:
    pair = pair_of("mixtral")
    subspace = SafetySubspace.from_models(pair.aligned_dir, pair.base_dir, LOX)
    before = {name: found.U.clone() for name, found in subspace.factors.items()}
    state = torch.get_rng_state()
    random = random_subspace(subspace, 0)
    assert torch.equal(state, torch.get_rng_state())
    for name, found in random.factors.items():
        assert torch.equal(subspace.factors[name].U, before[name])
        assert torch.equal(found.S, subspace.factors[name].S)
        assert not torch.equal(found.U, before[name])
        for gram in (found.U.T @ found.U, found.Vh @ found.Vh.T):
            assert torch.allclose(gram, torch.eye(found.rank), atol=1e-6)


@pytest.mark.parametrize("kind", ["hardened", "random"])
def test_directions_that_were_found_before_give_the_same_model(kind: Any, pair_of: Callable[[str], zoo.Pair]) -> None:
    pair = pair_of("llama")
    wider = SafetySubspace.from_models(pair.aligned_dir, pair.base_dir, LoxConfig(r=6))
    variant = Variant(kind, LOX)
    found, given = edit_of(pair, variant), edit_of(pair, variant, subspace=wider)
    for name, edit in found.items():
        if kind == "hardened":  # how many directions are sought moves them by rounding
            assert torch.allclose(edit, given[name], atol=1e-4), name
        else:
            assert torch.allclose(edit.norm(), given[name].norm(), rtol=1e-4), name


def test_an_energy_share_takes_as_many_random_directions(pair_of: Callable[[str], zoo.Pair]) -> None:
    pair, lox = pair_of("llama"), LoxConfig(r=0.6, alpha=1.0)
    true, random = (edit_of(pair, Variant(kind, lox)) for kind in ("hardened", "random"))
    for name, edit in true.items():
        ranks = [int((torch.linalg.svdvals(found) > 1e-3).sum()) for found in (edit, random[name])]
        assert ranks[0] == ranks[1] > 0, name


def test_expo_adds_all_of_the_change(pair_of: Callable[[str], zoo.Pair]) -> None:
    pair = pair_of("llama")
    _, _, expo = make_variants([LoxConfig(r=2, alpha=0.5, rank_pattern={"q_proj": 3})], ["expo"])
    aligned, base = pair.aligned(), pair.base()
    edit = edit_of(pair, expo)
    assert len(edit) == sum(tensor.ndim > 1 for tensor in aligned.values())
    for name, added in edit.items():
        assert torch.allclose(added, 0.5 * (aligned[name].double() - base[name].double()), atol=1e-6), name


def test_rescaled_is_refused_where_the_function_would_change(pair_of: Callable[[str], zoo.Pair]) -> None:
    with pytest.raises(UnsupportedModelError, match="tied"):
        edit_of(pair_of("gpt2"), Variant("rescaled"))


def test_only_a_model_that_lox_hardened_says_so(pair_of: Callable[[str], zoo.Pair]) -> None:
    pair = pair_of("llama")
    for kind, stamped in (("hardened", True), ("random", False)):
        model = load(pair.aligned_dir)
        edit_weights(model, Variant(kind, LOX), base_model=pair.base_dir)  # type: ignore[arg-type]
        assert hasattr(model.config, "lox_config") == stamped


def test_a_hardened_model_is_not_hardened_again(pair_of: Callable[[str], zoo.Pair]) -> None:
    pair = pair_of("llama")
    model = load(pair.aligned_dir)
    edit_weights(model, Variant("hardened", LOX), base_model=pair.base_dir)
    for kind in ("hardened", "random"):
        with pytest.raises(AlreadyHardenedError):
            edit_weights(model, Variant(kind, LOX), base_model=pair.base_dir)  # type: ignore[arg-type]
