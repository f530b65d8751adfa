"""The drift of models that were built to a known one, for every way a file can name and shape its weights."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import zoo
from drift_oracle import erase, expected_drift, fine_tune
from lox_hf import (
    ConfigError,
    LoxConfig,
    NumericsError,
    PairingError,
    SafetySubspace,
    UnsupportedModelError,
    apply_lox,
)
from lox_hf.records import DriftReading
from lox_hf.training.monitor import DriftMonitor, read_drift

R = 2  # the zoo's spectra have a gap after the second direction
EXACT = 1e-5  # float32 arithmetic on matrices of a hundred rows
KNOWN_SHARE = 1e-3  # how well a known share must be read
ATTENTION = [f"self_attn.{side}_proj" for side in "qkvo"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Saved"]:
    yield Saved(tmp_path_factory.mktemp("pairs"))


class Saved:
    """Pairs and their subspaces, each made when it is first asked for; tests only read them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pairs: dict[tuple[str, torch.dtype], zoo.Pair] = {}
        self.subspaces: dict[tuple[str, torch.dtype], SafetySubspace] = {}

    def __call__(self, kind: str = "llama", dtype: torch.dtype = torch.bfloat16) -> tuple[zoo.Pair, SafetySubspace]:
        key = (kind, dtype)
        if key not in self.pairs:
            pair = zoo.save_pair(kind, self.folder / str(len(self.pairs)), dtype=dtype, base_max_shard_size="50KB")
            self.pairs[key] = pair
            self.subspaces[key] = SafetySubspace.from_models(pair.aligned_dir, pair.base_dir, LoxConfig(r=R))
        return self.pairs[key], self.subspaces[key]


def load(folder: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def model_of(pair: zoo.Pair, tensors: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The pair's model with other weights, given by checkpoint name."""
    config = zoo.make_config(pair.kind)
    return type(zoo.make_model(pair.kind)).from_pretrained(None, config=config, state_dict=tensors, dtype=pair.dtype)


def names(reading: DriftReading) -> list[str]:
    return [drift.name for drift in reading.tensors]


def tensor_names(reading: DriftReading) -> list[str]:
    """Names of the tensors, a stack of matrices once."""
    return list(dict.fromkeys(name.partition("[")[0] for name in names(reading)))


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_the_aligned_model_is_where_it_was(kind: str, saved: Saved) -> None:
    pair, subspace = saved(kind)
    reading = read_drift(load(pair.aligned_dir), subspace, pair.base_dir)
    assert (reading.retention, reading.ratio) == pytest.approx((1, 1), abs=EXACT)
    for drift in reading.tensors:
        assert (drift.retention, drift.r_ft) == pytest.approx((1, drift.r_align), abs=EXACT)


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_a_fine_tuned_model_by_the_definitions_in_memory_and_in_files(kind: str, saved: Saved, tmp_path: Path) -> None:
    pair, subspace = saved(kind)
    tuned = fine_tune(pair.aligned(), pair.base())
    model = model_of(pair, tuned)
    model.save_pretrained(tmp_path / "tuned")
    live, files = (read_drift(form, subspace, pair.base_dir) for form in (model, tmp_path / "tuned"))
    assert replace(live, tensors=()) == replace(files, tensors=())
    assert {drift.name: drift for drift in live.tensors} == {drift.name: drift for drift in files.tensors}
    expected = expected_drift(tuned, pair.aligned(), pair.base(), R, tensor_names(live))
    found = (live.retention, live.r_ft, live.r_align, live.ratio)
    exact = (expected.retention, expected.r_ft, expected.r_align, expected.r_ft / expected.r_align)
    assert found == pytest.approx(exact, abs=EXACT)
    assert live.retention < 0.6 and live.ratio < 0.8  # control: it has moved
    assert DriftReading.from_json(live.to_json()) == live


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_a_safety_component_erased_to_a_known_share(share: float, dtype: torch.dtype, saved: Saved) -> None:
    pair, subspace = saved("llama", dtype)
    aligned = {name: tensor.float() for name, tensor in pair.aligned().items()}
    # In float32, as a model in training is held: rounding to bfloat16 moves the component itself.
    model = load(pair.aligned_dir, torch.float32)
    model.load_state_dict(erase(aligned, pair.base(), R, share))
    reading = read_drift(model, subspace, pair.base_dir)
    assert reading.retention == pytest.approx(1 - share, abs=KNOWN_SHARE)
    assert all(drift.retention == pytest.approx(1 - share, abs=KNOWN_SHARE) for drift in reading.tensors)
    assert reading.ratio < 1 - 0.02 * share


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("alpha", [0.5, 1.25])
def test_hardening_adds_its_alpha(alpha: float, dtype: torch.dtype, saved: Saved) -> None:
    pair, subspace = saved("llama", dtype)
    hardened = apply_lox(load(pair.aligned_dir), LoxConfig(r=R, alpha=alpha), base_model=subspace)
    reading = read_drift(hardened, subspace, pair.base_dir)
    if dtype == torch.float32:  # the zoo's changes are a few units of bfloat16, whose rounding moves them
        assert reading.retention == pytest.approx(1 + alpha, abs=KNOWN_SHARE)
    stored = expected_drift(hardened.state_dict(), pair.aligned(), pair.base(), R, names(reading))
    assert (reading.retention, reading.r_ft) == pytest.approx((stored.retention, stored.r_ft), abs=EXACT)
    assert reading.ratio > 1  # by construction, as the record says


def test_the_base_has_kept_nothing_and_has_no_change_to_take_shares_of(saved: Saved) -> None:
    pair, subspace = saved()
    reading = read_drift(load(pair.base_dir), subspace, pair.base_dir)
    assert reading.retention == 0
    assert all(map(math.isnan, (reading.r_ft, reading.r_align, reading.ratio)))
    assert all(drift.retention == 0 and math.isnan(drift.r_ft) and drift.r_align > 0.5 for drift in reading.tensors)


def test_one_matrix_back_at_the_base_lowers_retention_and_leaves_the_means(saved: Saved) -> None:
    pair, subspace = saved()
    whole = read_drift(load(pair.aligned_dir), subspace, pair.base_dir)
    lost = whole.tensors[3].name
    model = model_of(pair, {**pair.aligned(), lost: pair.base()[lost]})
    reading = read_drift(model, subspace, pair.base_dir)
    energies = {name: factors.S.double().square().sum().item() for name, factors in subspace.factors.items()}
    share = energies[lost] / sum(energies[name] for name in names(whole))
    assert reading.retention == pytest.approx(1 - share, abs=EXACT) and share > 0.01
    others = [drift.r_align for drift in whole.tensors if drift.name != lost]
    assert (reading.r_align, reading.r_ft) == pytest.approx((sum(others) / 14,) * 2, abs=EXACT)


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        ("llama", ["model.embed_tokens.weight"]),
        ("llama_tied", []),  # the embedding is the head
        ("gpt2", ["transformer.wpe.weight"]),
        ("mixtral", ["model.embed_tokens.weight", "block_sparse_moe.gate.weight"]),
        ("gpt_oss", ["model.embed_tokens.weight", "router.weight", "gate_up_proj_bias", "down_proj_bias"]),
    ],
)
def test_by_default_every_linear_layer_is_read(kind: str, left_out: list[str], saved: Saved) -> None:
    pair, subspace = saved(kind)
    for model in (load(pair.aligned_dir), pair.aligned_dir):
        found = names(read_drift(model, subspace, pair.base_dir))
        expected = [name for name in subspace.factors if not name.partition("[")[0].endswith(tuple(left_out))]
        assert sorted(found) == sorted(expected)


def test_experts_are_named_as_in_the_file(saved: Saved) -> None:
    pair, subspace = saved("granitemoe")
    found = names(read_drift(load(pair.aligned_dir), subspace, pair.base_dir))
    assert [name for name in found if "layers.1" in name and "input_linear" in name] == [
        f"model.layers.1.block_sparse_moe.input_linear.weight[{number}]" for number in range(4)
    ]


@pytest.mark.parametrize(
    ("target_modules", "count"),
    [
        pytest.param("all-linear", 14, id="all-linear"),
        pytest.param(["q_proj", "v_proj"], 4, id="list"),
        pytest.param(r".*layers\.0\..*|.*embed_tokens", 8, id="regular-expression"),
    ],
)
def test_target_modules_choose(target_modules: list[str] | str, count: int, saved: Saved) -> None:
    pair, subspace = saved()
    reading = read_drift(pair.aligned_dir, subspace, pair.base_dir, target_modules=target_modules)
    assert len(reading.tensors) == count and "lm_head.weight" not in names(reading)


@pytest.mark.parametrize("told", [True, False], ids=["told", "by-hand"])
def test_an_embedding_that_is_the_head_is_read_once(told: bool) -> None:
    base, aligned = Tied(0.0, told), Tied(0.1, told)
    subspace = SafetySubspace.from_models(aligned, base, LoxConfig(r=R))
    reading = read_drift(aligned, subspace, base)
    assert names(reading) == list(subspace.factors) == ["embedding.weight" if told else "head.weight"]
    assert reading.retention == pytest.approx(1, abs=EXACT)


class Tied(nn.Module):
    """A head that is the embedding as well; transformers' models say so, and which of the two names is stored."""

    def __init__(self, change: float, told: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.head, self.embedding = nn.Linear(12, 20, bias=False), nn.Embedding(20, 12)
        weights = torch.randn(20, 12, generator=generator) + change * torch.randn(20, 12, generator=generator)
        self.embedding.weight = self.head.weight = nn.Parameter(weights)
        self.all_tied_weights_keys = {"head.weight": "embedding.weight"} if told else {}


def test_files_that_store_a_tied_head_twice_fit_the_loaded_model(saved: Saved) -> None:
    pair, _ = saved("llama_tied")
    aligned, base = pair.aligned(), pair.base()
    for side in (aligned, base):
        side["lm_head.weight"] = side["model.embed_tokens.weight"]
    subspace = SafetySubspace.from_models(aligned, base, LoxConfig(r=R))
    assert "lm_head.weight" in subspace.factors
    reading = read_drift(load(pair.aligned_dir), subspace, pair.base_dir)
    assert "model.embed_tokens.weight" in names(reading) and "lm_head.weight" not in names(reading)


def test_fewer_matrices_than_asked_for_are_said(saved: Saved, recwarn: pytest.WarningsRecorder) -> None:
    pair, whole = saved()
    config = LoxConfig(r=R, target_modules=ATTENTION)
    subspace = SafetySubspace.from_models(pair.aligned_dir, pair.base_dir, config)
    read_drift(pair.aligned_dir, whole, pair.base_dir)
    read_drift(pair.aligned_dir, subspace, pair.base_dir, target_modules=ATTENTION)
    assert not recwarn.list  # control: as many as asked for
    with pytest.warns(UserWarning, match=r"does not hold 7 of the matrices .* lm_head\.weight"):
        reading = read_drift(pair.aligned_dir, subspace, pair.base_dir)
    assert len(reading.tensors) == 8 and reading.retention == pytest.approx(1, abs=EXACT)
    with pytest.raises(PairingError, match=r"holds none of the matrices .* lm_head\.weight"):
        read_drift(pair.aligned_dir, subspace, pair.base_dir, target_modules=["lm_head"])


def test_training_in_another_dtype_is_no_drift(saved: Saved) -> None:
    pair, subspace = saved()
    wider = read_drift(load(pair.aligned_dir, torch.float32), subspace, pair.base_dir)
    assert wider.retention == pytest.approx(1, abs=EXACT)
    finer = read_drift(load(pair.aligned_dir, torch.float16), subspace, pair.base_dir)
    assert finer.retention == pytest.approx(1, abs=KNOWN_SHARE)  # of numbers this small float16 has more digits


def test_a_base_that_was_rounded_for_the_subspace_is_rounded_again(saved: Saved) -> None:
    pair, _ = saved()
    generator = torch.Generator().manual_seed(0)
    # As a base in float32 whose digits beyond bfloat16 are lost in aligning: a third of a bfloat16 unit.
    base = {
        name: tensor.float() * (1 + 2**-9 * 0.6 * torch.rand(tensor.shape, generator=generator))
        for name, tensor in pair.base().items()
    }
    config = LoxConfig(r=R, cast_base=True)
    subspace = SafetySubspace.from_models(pair.aligned_dir, base, config)
    model = load(pair.aligned_dir, torch.float32)
    assert read_drift(model, subspace, base).ratio == pytest.approx(1, abs=EXACT)
    unrounded = replace(subspace, config=LoxConfig(r=R))
    assert abs(read_drift(model, unrounded, base).ratio - 1) > 3 * EXACT  # control: the digits can be seen


def test_reading_leaves_everything_as_it_was(saved: Saved) -> None:
    pair, subspace = saved()
    model = load(pair.aligned_dir).train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    read_drift(model, subspace, pair.base_dir)
    assert zoo.same_bits(model.state_dict(), before) and model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


def test_a_reading_inside_autocast_is_as_exact(saved: Saved) -> None:
    pair, subspace = saved()
    model = load(pair.aligned_dir)
    plain = read_drift(model, subspace, pair.base_dir)
    with torch.autocast("cpu", torch.bfloat16):
        assert read_drift(model, subspace, pair.base_dir) == plain
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16  # control: autocast was on


@pytest.mark.parametrize("form", ["module", "state dict"])
def test_a_base_in_memory_is_as_good(form: str, saved: Saved) -> None:
    pair, subspace = saved("mixtral")
    model, base = load(pair.aligned_dir), load(pair.base_dir)
    in_memory = base if form == "module" else base.state_dict()
    assert read_drift(model, subspace, in_memory) == read_drift(model, subspace, pair.base_dir)


def test_all_mismatches_are_said_at_once(saved: Saved) -> None:
    pair, subspace = saved()
    base = pair.base()
    base["lm_head.weight"] = torch.zeros(200, 96)
    base["model.layers.1.mlp.up_proj.weight"] = base["model.layers.1.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    del base["model.layers.0.self_attn.q_proj.weight"]
    tensors = pair.aligned()
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"][:, :40]
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    with pytest.raises(PairingError) as error:
        read_drift(tensors, subspace, base, target_modules=[*ATTENTION, "up_proj", "down_proj", "lm_head"])
    for problem in (
        "6 matrices differ",
        "lm_head.weight: (192, 96) against (200, 96) in base",
        "model.layers.1.mlp.up_proj.weight: stored as float8_e4m3fn in base",
        "model.layers.0.self_attn.q_proj.weight: missing in base",
        "model.layers.0.mlp.down_proj.weight: (96, 40) against (96, 144) in base",
        "model.layers.0.mlp.down_proj.weight: (96, 40) against (96, 144) in the subspace",
        "model.layers.1.self_attn.o_proj.weight: only in the subspace",
        f"The subspace is of '{pair.aligned_dir}' - '{pair.base_dir}'",
    ):
        assert problem in str(error.value)


def test_another_architecture_does_not_fit(saved: Saved) -> None:
    (pair, _), (_, other) = saved("qwen2"), saved("llama")
    with pytest.raises(PairingError, match=r"lm_head\.weight: \(64, 32\) against \(192, 96\) in the subspace"):
        read_drift(pair.aligned_dir, other, pair.base_dir)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_has_diverged_is_named(value: float, saved: Saved) -> None:
    pair, subspace = saved()
    model = load(pair.aligned_dir)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[3, 4] = value
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight: dW contains NaN or Inf"):
        read_drift(model, subspace, pair.base_dir)


def test_what_cannot_be_read_is_refused(saved: Saved) -> None:
    pair, subspace = saved()
    prompts = get_peft_model(load(pair.aligned_dir), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UnsupportedModelError, match="PROMPT_TUNING"):
        read_drift(prompts, subspace, pair.base_dir)
    with pytest.raises(ConfigError, match="name the matrices with target_modules"):
        read_drift(pair.aligned(), subspace, pair.base_dir)
    with pytest.raises(ConfigError, match="matches no module"):
        read_drift(pair.aligned_dir, subspace, pair.base_dir, target_modules=["no_such_layer"])


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_retention_needs_no_base(kind: str, saved: Saved, tmp_path: Path) -> None:
    pair, subspace = saved(kind)
    tuned = fine_tune(pair.aligned(), pair.base())
    model = model_of(pair, tuned)
    model.save_pretrained(tmp_path / "tuned")
    expected = read_drift(model, subspace, pair.base_dir)
    monitor = DriftMonitor(model, subspace)
    for reading in (read_drift(model, subspace), read_drift(tmp_path / "tuned", subspace), monitor.read()):
        assert reading.retention == pytest.approx(expected.retention, abs=EXACT)
        assert sorted(names(reading)) == sorted(names(expected))
        assert all(map(math.isnan, (reading.r_ft, reading.r_align, reading.ratio)))
    again = DriftMonitor(model, subspace, pair.base_dir).read()
    assert (again.r_ft, again.r_align) == pytest.approx((expected.r_ft, expected.r_align), abs=EXACT)
    assert expected.retention < 0.9  # control: it has moved


def test_a_monitor_follows_the_model(saved: Saved) -> None:
    pair, subspace = saved("llama", torch.float32)
    model = load(pair.aligned_dir, torch.float32)
    monitor = DriftMonitor(model, subspace)
    before = monitor.read().retention
    model.load_state_dict(erase(pair.aligned(), pair.base(), R, 0.25))
    assert (before, monitor.read().retention) == pytest.approx((1, 0.75), abs=KNOWN_SHARE)


def test_lora_is_read_as_the_merged_model(saved: Saved) -> None:
    pair, subspace = saved("llama", torch.float32)
    adapters = LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(load(pair.aligned_dir, torch.float32), adapters)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape).sin())
    adapted = [read_drift(model, subspace, base) for base in (None, pair.base_dir)]
    merged = model.merge_and_unload()
    for reading, base in zip(adapted, (None, pair.base_dir), strict=True):
        expected = read_drift(merged, subspace, base)
        assert reading.retention == pytest.approx(expected.retention, abs=EXACT)
        assert sorted(names(reading)) == sorted(names(expected))
    assert adapted[1].r_ft == pytest.approx(expected.r_ft, abs=EXACT)
    assert abs(expected.r_ft - expected.r_align) > 0.01  # control: the adapter has moved it
