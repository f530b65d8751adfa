"""The run: a candidate is what hardening makes of the model, which is left as it was, and a kill costs nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import zoo
from lox_hf import LoxConfig, SafetySubspace
from lox_hf.analysis.select import select
from lox_hf.errors import AlreadyHardenedError, ConfigError, LoxError, OutputError, PairingError, UnsupportedModelError
from lox_hf.harden import harden_checkpoint
from lox_hf.records import Limit, Score, Selection
from lox_hf.statistics import rate
from lox_hf.weights.live import live_tensors
from test_bad_input import contents

LIMITS = (Limit("distance", 1.0),)
GRID: dict[str, Any] = {"rs": (1, 3, 0.6, None), "alphas": (0.5, 1.0), "targets": ("all", "attention")}


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> zoo.Pair:
    return zoo.save_pair(request.param, tmp_path_factory.mktemp(request.param), dtype=torch.float32)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> zoo.Pair:
    return zoo.save_pair("llama", tmp_path_factory.mktemp("one"), dtype=torch.float32)


def load(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def distance_from(pair: zoo.Pair) -> Callable[[nn.Module], Score]:
    """A measure with a closed form: how far the weights are from the aligned ones."""
    aligned = pair.aligned()

    def measure(model: nn.Module) -> Score:
        squares = [(tensor - aligned[name]).double().square().sum() for name, tensor in live_tensors(model).items()]
        return Score(figures={"distance": sum(squares).sqrt().item()})

    return measure


def ruin(model: nn.Module) -> Score:
    """An attack that leaves nothing of the weights, and is the less successful the larger they were."""
    size = sum(tensor.double().abs().sum().item() for tensor in model.state_dict().values())
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.fill_(float("nan"))
    return Score({"asr": rate(5, 10)}, {"asr_mean": 1 / size}, {"asr": "1" * 5 + "0" * 5})


def same(model: nn.Module, pair: zoo.Pair) -> bool:
    return zoo.same_bits(dict(live_tensors(model)), pair.aligned())


@pytest.mark.parametrize("from_files", [True, False])
def test_every_candidate_is_as_far_as_its_strength_says(pair: zoo.Pair, from_files: bool) -> None:
    model = load(pair.aligned_dir)
    whole = sum(
        (aligned - pair.base()[name]).double().square().sum()
        for name, aligned in pair.aligned().items()
        if aligned.ndim > 1
    ).sqrt()
    found = select(
        model,
        pair.base_dir,
        distance_from(pair),
        **GRID,
        limits=LIMITS,
        aligned_model=pair.aligned_dir if from_files else None,
        progressbar=False,
    )
    assert found.aligned_score.value("distance") == 0 and len(found.candidates) == 16
    for item in found.candidates:
        assert item.score.value("distance") == pytest.approx(item.strength * whole.item(), rel=1e-3), item.name
    assert found.get("r=full alpha=1 all").strength == pytest.approx(1.0)
    assert same(model, pair)


def test_a_candidate_is_what_harden_writes(one: zoo.Pair, tmp_path: Path) -> None:
    seen: dict[str, dict[str, torch.Tensor]] = {}

    def keep(model: nn.Module) -> float:
        seen[str(len(seen))] = {name: tensor.clone() for name, tensor in live_tensors(model).items()}
        return 0.0

    found = select(
        load(one.aligned_dir),
        one.base_dir,
        keep,
        rs=[2, None],
        alphas=[0.5],
        limits=[],
        aligned_model=one.aligned_dir,
        output_dir=tmp_path / "run",
        progressbar=False,
    )
    written = LoxConfig.from_pretrained(tmp_path / "run")
    assert written.to_dict() == found.get("r=full alpha=0.5 all").config  # the strongest, as there is no limit
    assert written.base_model_name_or_path == str(one.base_dir)
    subspace = SafetySubspace.from_pretrained(tmp_path / "run" / "subspace")
    for place, (item, base) in enumerate(zip(found.candidates, (subspace, None), strict=True), start=1):
        folder = tmp_path / str(place)
        harden_checkpoint(one.aligned_dir, folder, LoxConfig(**item.config), base_model=base, progressbar=False)
        assert zoo.same_bits(seen[str(place)], zoo.read_checkpoint(folder))
    assert not zoo.same_bits(seen["0"], seen["1"])  # control


@pytest.mark.parametrize("from_files", [True, False])
def test_an_attack_that_ruins_the_weights(pair: zoo.Pair, from_files: bool) -> None:
    model = load(pair.aligned_dir)
    found = select(
        model,
        pair.base_dir,
        distance_from(pair),
        **GRID,
        limits=[],
        attack_fn=ruin,
        attack_most=3,
        aligned_model=pair.aligned_dir if from_files else None,
        progressbar=False,
    )
    attacked = [item for item in found.candidates if item.attacked is not None]
    assert found.objective == "asr_mean" and found.aligned_attacked is not None
    # Three, among which is the full rank that is asked about in any case.
    assert [item.name for item in attacked] == ["r=3 alpha=1 all", "r=0.6 alpha=1 all", "r=full alpha=1 all"]
    assert all(item.attacked.value("asr_mean") > 0 for item in attacked)  # NaN, had one begun from ruins
    assert same(model, pair)


def test_the_model_is_left_as_it_was_when_a_measure_fails(one: zoo.Pair) -> None:
    model = load(one.aligned_dir)

    def fail(model: nn.Module) -> float:
        if not same(model, one):
            raise LoxError("the judge is out of reach")
        return 0.0

    with pytest.raises(LoxError, match="out of reach"):
        select(model, one.base_dir, fail, aligned_model=one.aligned_dir, progressbar=False)
    assert same(model, one)


def test_other_tensors_in_the_place_of_the_weights_are_noticed(one: zoo.Pair) -> None:
    def swap(model: nn.Module) -> float:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
        return 0.0

    with pytest.raises(UnsupportedModelError, match="put other tensors in the place"):
        select(load(one.aligned_dir), one.base_dir, distance_from(one), limits=[], attack_fn=swap, progressbar=False)


class Killed(BaseException):
    """What no handler catches."""


@pytest.mark.parametrize("after", [9, 18])  # among the candidates, and among the attacks
def test_a_killed_run_goes_on_to_the_same_bytes(one: zoo.Pair, tmp_path: Path, after: int) -> None:
    calls: list[str] = []

    def counted(measure: Callable[[nn.Module], Score], most: int) -> Callable[[nn.Module], Score]:
        def count(model: nn.Module) -> Score:
            if len(calls) == most:
                raise Killed
            calls.append("")
            return measure(model)

        return count

    def run(folder: Path, most: int) -> Selection:
        measures = counted(distance_from(one), most), counted(ruin, most)
        common = {"limits": LIMITS, "attack_most": 2, "aligned_model": one.aligned_dir, "progressbar": False}
        model = load(one.aligned_dir)
        return select(model, one.base_dir, measures[0], attack_fn=measures[1], output_dir=folder, **GRID, **common)

    whole = run(tmp_path / "whole", 1000)
    count = len(calls)
    assert count == 17 + len([item for item in whole.candidates if item.attacked]) + 1
    calls.clear()
    with pytest.raises(Killed):
        run(tmp_path / "killed", after)
    assert run(tmp_path / "killed", 1000) == whole
    assert len(calls) == count  # nothing was measured twice
    # Directions are numbers in a file whose header safetensors writes in any order, with the time they took beside it.
    files = [
        {name: data for name, data in contents(tmp_path / folder).items() if not name.startswith("subspace")}
        for folder in ("whole", "killed")
    ]
    assert files[0] == files[1] and len(files[0]) > 20


def test_a_finished_run_takes_more_and_other_limits(one: zoo.Pair, tmp_path: Path) -> None:
    def run(**changes: Any) -> Selection:
        given = {
            "rs": (1,),
            "alphas": (1.0,),
            "limits": LIMITS,
            "about": {"prompts": 1},
            "output_dir": tmp_path / "run",
        }
        given |= {"aligned_model": one.aligned_dir, "progressbar": False}
        return select(load(one.aligned_dir), one.base_dir, distance_from(one), **given | changes)

    first = run()
    more = run(rs=(1, 5))
    assert more.candidates[0] == first.candidates[0] and len(more.candidates) == 2
    assert (tmp_path / "run" / "lox_config.json").exists()
    none = run(limits=[Limit("distance", 0.0)])
    assert none.recommended is None and not (tmp_path / "run" / "lox_config.json").exists()
    with pytest.raises(OutputError, match="other settings"):
        run(about={"prompts": 2})


@pytest.mark.parametrize(
    ("attacked", "objective", "expected"),
    [
        ({"asr_mean": 0.5, "asr": 0.9, "kl": 1.0}, None, "asr_mean"),
        ({"asr": 0.9, "kl": 1.0}, None, "asr"),
        ({"harm": 0.9}, None, "harm"),
        ({"harm": 0.9, "asr": 1.0}, "harm", "harm"),
        ({"harm": 0.9, "kl": 1.0}, None, ConfigError),
        ({"harm": 0.9}, "asr", ConfigError),
        ({"asr": float("nan")}, None, ConfigError),
    ],
)
def test_what_decides_after_an_attack(
    one: zoo.Pair, attacked: dict[str, float], objective: str | None, expected: Any
) -> None:
    def run() -> Selection:
        given = {"rs": [1], "alphas": [1.0], "limits": [], "objective": objective, "progressbar": False}
        return select(load(one.aligned_dir), one.base_dir, distance_from(one), attack_fn=lambda _: attacked, **given)

    if isinstance(expected, str):
        assert run().objective == expected
        return
    with pytest.raises(expected, match="Say which of these decides"):
        run()


def test_saved_directions(one: zoo.Pair, tmp_path: Path) -> None:
    def run(subspace: SafetySubspace | None, **changes: Any) -> Selection:
        given = {"rs": (1, 2), "alphas": (1.0,), "limits": LIMITS, "subspace": subspace, "progressbar": False}
        return select(load(one.aligned_dir), None, distance_from(one), config=config, **given | changes)

    config = LoxConfig(str(one.base_dir), r=3)
    subspace = SafetySubspace.from_models(one.aligned_dir, one.base_dir, config, progressbar=False)
    with_them, without = run(subspace), run(None)
    for ours, theirs in zip(with_them.candidates, without.candidates, strict=True):
        assert ours.score.value("distance") == pytest.approx(theirs.score.value("distance"), rel=1e-4)
    with pytest.raises(PairingError, match="r = 4 against 3 stored directions"):
        run(subspace, rs=(4,))
    other = zoo.save_pair("llama", tmp_path, dtype=torch.float32, seed=1)
    with pytest.raises(PairingError, match="made from other models"):
        run(SafetySubspace.from_models(other.aligned_dir, other.base_dir, config, progressbar=False))


def test_wrong_inputs(one: zoo.Pair, tmp_path: Path) -> None:
    def run(base: Any = one.base_dir, aligned: Path = one.aligned_dir, **changes: Any) -> Selection:
        return select(load(aligned), base, distance_from(one), **{"progressbar": False} | changes)

    with pytest.raises(ConfigError, match="alpha = 0 is the aligned model"):
        run(alphas=[0.0])
    with pytest.raises(ConfigError, match="attack_most must be 1 or more, got 0"):
        run(attack_most=0)
    with pytest.raises(ConfigError, match="kl must be a number of 0 or more"):
        run(limits=[Limit("kl", -1.0)])
    with pytest.raises(PairingError, match="equal in every matrix"):
        run(base=one.aligned_dir)
    with pytest.raises(PairingError, match="Cannot pair"):
        run(base=zoo.save_pair("qwen2", tmp_path / "other").base_dir)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="something else"):
        run(output_dir=tmp_path / "full")
    harden_checkpoint(one.aligned_dir, tmp_path / "hardened", LoxConfig(str(one.base_dir), r=1), progressbar=False)
    with pytest.raises(AlreadyHardenedError):
        run(aligned=tmp_path / "hardened", aligned_model=tmp_path / "hardened")
