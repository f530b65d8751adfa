"""Weights between models, one loaded model as the place for many, and points: against float64, and bit for bit."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import zoo
from lox_hf import LoxConfig, apply_lox
from lox_hf.analysis.formed import FormedModel
from lox_hf.analysis.points import PointJob, identity, measured
from lox_hf.core.combine import combine
from lox_hf.core.delta import Delta
from lox_hf.core.lowrank import LowRank, decompose
from lox_hf.errors import ConfigError, LoxError, NumericsError, PairingError
from lox_hf.inputs import open_pair
from lox_hf.jobs import Runner
from lox_hf.records import Score
from lox_hf.run_folder import RunFolder
from lox_hf.statistics import rate
from lox_hf.weights.live import live_tensors
from lox_hf.weights.source import CheckpointSource, DictSource

KINDS = ["llama_tied", "mixtral", "gpt_oss", "granitemoe"]
COEFFICIENTS = st.lists(st.floats(-2, 2, allow_subnormal=False), min_size=1, max_size=4)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def directions(rows: int, columns: int, k: int = 2) -> LowRank:
    return decompose(Delta(drawn(rows, columns, seed=9), torch.zeros(rows, columns)), k).factors


@given(COEFFICIENTS, st.integers(1, 3), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.booleans())
def test_a_combination_is_float64_rounded_once(
    coefficients: list[float], rows: int, dtype: torch.dtype, more: bool
) -> None:
    parts = [(drawn(rows, 5, seed=number, dtype=dtype), c) for number, c in enumerate(coefficients)]
    added = directions(rows, 5, 1) if more else None
    out = torch.full((rows, 5), math.nan, dtype=dtype)
    combine(parts, out, added)
    exact = sum(c * part.double() for part, c in parts) + (added.dense().double() if added else 0)
    assert isinstance(exact, torch.Tensor)
    # Half a unit of the stored dtype, and a few float32 roundings of numbers up to about 10.
    allowed = exact.abs() * (0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2) + 1e-5
    assert ((out.double() - exact).abs() <= allowed).all()


def test_many_tiles_are_one_matrix() -> None:
    rows, columns = 1200, 1000  # three tiles
    first, second, added = drawn(rows, columns), drawn(rows, columns, seed=1), directions(rows, columns)
    out = torch.empty(rows, columns)
    combine([(first, 0.25), (second, -1.5)], out, added)
    exact = 0.25 * first.double() - 1.5 * second.double() + added.dense().double()
    assert (out - exact).abs().max() < 1e-5


def test_one_part_is_copied_bit_for_bit() -> None:
    part = torch.tensor([[-0.0, 1e-40, 65504.0], [0.1, -3.0, 2.0**-24]])
    for dtype in (torch.float32, torch.float16):
        stored, out = part.to(dtype), torch.empty(2, 3, dtype=dtype)
        broken = torch.full((2, 3), math.nan, dtype=dtype)
        combine([(broken, 0.0), (stored, 1.0)], out)  # what has no weight is not read
        assert zoo.same_bits({"": out}, {"": stored})
    with pytest.raises(NumericsError, match="NaN or Inf"):  # control
        combine([(torch.full((2, 3), math.nan), 1e-30), (part, 1.0)], torch.empty(2, 3))


def test_what_does_not_fit_the_dtype_is_refused() -> None:
    large = torch.full((1, 2), 60000.0, dtype=torch.float16)
    with pytest.raises(NumericsError, match="overflows float16"):
        combine([(large, 2.0)], torch.empty(1, 2, dtype=torch.float16))
    combine([(large, 2.0)], out := torch.empty(1, 2))  # control: it fits float32
    assert out.tolist() == [[120000.0] * 2]


def load(pair: zoo.Pair) -> Any:
    return AutoModelForCausalLM.from_pretrained(pair.aligned_dir, dtype=pair.dtype)


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_becomes_a_mixture_and_itself_again(kind: str, tmp_path: Path) -> None:
    pair = zoo.save_pair(kind, tmp_path, dtype=torch.float32)
    model = load(pair)
    before = state(model)
    formed = FormedModel(model, pair.aligned_dir)
    base = CheckpointSource(pair.base_dir, "base")
    with formed.restored_afterwards():
        formed.mix([(formed.source, 0.75), (base, 0.25)])
        found, aligned, theirs = live_tensors(model), pair.aligned(), pair.base()
        for name in aligned:
            exact = 0.75 * aligned[name].double() + 0.25 * theirs[name].double()
            assert (found[name].double() - exact).abs().max() < 1e-6, name
        assert not zoo.same_bits(state(model), before)  # control
    assert zoo.same_bits(state(model), before)


@pytest.mark.parametrize("from_files", [True, False])
@pytest.mark.parametrize("kind", ["llama_tied", "gpt_oss"])
def test_a_hardened_form_is_the_hardened_model(kind: str, from_files: bool, tmp_path: Path) -> None:
    pair = zoo.save_pair(kind, tmp_path)
    model, other = load(pair), load(pair)
    before = state(model)
    formed = FormedModel(model, pair.aligned_dir if from_files else None)
    for config in (LoxConfig(r=2, alpha=0.5, exclude_modules=["embed_tokens"]), LoxConfig(r=None, alpha=1.0)):
        opened = open_pair(pair.aligned_dir, pair.base_dir, config)
        formed.harden(opened.plans, opened.factors)  # from the aligned weights, whatever stood there before
        hardened = load(pair)
        apply_lox(hardened, config, base_model=pair.base_dir)
        assert zoo.same_bits(state(model), state(hardened))
        assert not zoo.same_bits(state(model), before)  # control
    formed.restore()
    assert zoo.same_bits(state(model), before) and zoo.same_bits(state(other), before)


def test_the_weights_come_back_however_a_block_ends() -> None:
    model = torch.nn.Linear(3, 2)
    before = state(model)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), FormedModel(model).restored_afterwards() as formed:
            formed.mix([(formed.source, 2.0)], names=["weight"])
            assert torch.equal(model.weight, 2 * before["weight"]) and torch.equal(model.bias, before["bias"])
            raise error
        assert zoo.same_bits(state(model), before)


def test_only_floating_weights_are_formed() -> None:
    model = torch.nn.BatchNorm1d(3)
    model.num_batches_tracked.fill_(7)
    formed = FormedModel(model)
    formed.mix([(formed.source, 3.0)])
    assert model.weight.tolist() == [3.0] * 3 and int(model.num_batches_tracked) == 7


def test_what_cannot_be_formed_comes_back_all_the_same() -> None:
    model = torch.nn.Linear(3, 2).double()  # more digits than float32 has
    with torch.no_grad():
        model.bias[0] = math.inf
    before = state(model)
    formed = FormedModel(model)
    with pytest.raises(NumericsError, match=r"^bias: "), formed.restored_afterwards():
        formed.mix([(formed.source, 0.5)])
    assert zoo.same_bits(state(model), before)
    formed.mix([(formed.source, 0.5)], names=[])  # no name is none, and not all
    assert zoo.same_bits(state(model), before)
    formed.mix([(formed.source, 0.5)], names=["weight"])  # control
    assert not zoo.same_bits(state(model), before)


def test_a_broken_weight_is_named() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    formed = FormedModel(model)
    theirs = {name: formed.source.get(name).clone() for name in formed.source.infos()}
    theirs["1.bias"][1] = math.inf
    with pytest.raises(NumericsError, match=r"^1\.bias: .*contains NaN or Inf"), formed.restored_afterwards():
        formed.mix([(DictSource(theirs, "theirs"), 1.0)])


def test_files_of_another_model_are_refused(tmp_path: Path) -> None:
    pair = zoo.save_pair("llama", tmp_path)
    model = load(pair)
    with pytest.raises(
        PairingError, match=r"does not hold the loaded model's weights: \d+ tensors differ\. .* numbers"
    ):
        FormedModel(model, pair.base_dir)
    other = zoo.save_pair("gpt2", tmp_path / "other")
    with pytest.raises(PairingError, match="missing there"):
        FormedModel(model, other.aligned_dir)
    FormedModel(model, pair.aligned_dir)  # control
    FormedModel(AutoModelForCausalLM.from_pretrained(pair.aligned_dir, dtype=torch.float32), pair.aligned_dir)


def test_weights_are_known_wherever_they_lie(tmp_path: Path) -> None:
    pair = zoo.save_pair("mixtral", tmp_path, dtype=torch.float32)
    files = CheckpointSource(pair.aligned_dir, "files")
    live = FormedModel(load(pair)).source
    assert list(live.infos()) != list(files.infos())  # another order
    assert identity(files) == identity(live) != identity(CheckpointSource(pair.base_dir, "base"))


def test_points_are_measured_once_also_in_memory(tmp_path: Path) -> None:
    calls = list[int]()

    def measure() -> Score:
        calls.append(1)
        return measured(lambda _: {"asr": rate(1, 3), "kl": math.nan, "ppl": math.inf}, torch.nn.Linear(1, 1))

    job = PointJob("points/0.json", {"x": 0.1}, measure)
    for folder in (None, tmp_path, tmp_path):
        with RunFolder(folder, {}) as run:
            (found,) = Runner(run, progressbar=False).results([job], "", "")
        assert (
            found.rates["asr"] == rate(1, 3) and math.isnan(found.figures["kl"]) and found.figures["ppl"] == math.inf
        )
    assert len(calls) == 2  # once in memory, once in the folder


@pytest.mark.parametrize("nothing", ["text", None, True, {"a": "b"}, torch.ones(1), {"a": 1, "b": torch.ones(1)}])
def test_a_score_function_that_measures_nothing_is_refused(nothing: object) -> None:
    with pytest.raises(ConfigError, match="must return a record, a rate or a number") as caught:
        measured(lambda _: nothing, torch.nn.Linear(1, 1))
    assert isinstance(caught.value, LoxError)
    assert measured(lambda _: 2, torch.nn.Linear(1, 1)).value("value") == 2  # control
