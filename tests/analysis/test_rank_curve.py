"""The rank curve on pairs whose answer is known: exact points, the model as it was, and runs that go on."""

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import oracle
import zoo
from analysis.known_pair import N, attacked, direction, distance_to, left_over, make_pair
from lox_hf import LoxConfig, SafetySubspace
from lox_hf.analysis.rank_curve import rank_curve
from lox_hf.errors import ConfigError, LoxError, OutputError, PairingError
from lox_hf.records import RankCurve, Score
from lox_hf.weights.live import live_tensors

RANKS = (0, 1, 2, 3, 5)
DTYPES = (torch.float32, torch.bfloat16)
# float32 sums of numbers below 1, over matrices of 14,000 entries.
CLOSE = 1e-5

Tensors = dict[str, torch.Tensor]


def copied(model: nn.Module) -> Tensors:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


class Recorder:
    """A score function that keeps the weights it is shown."""

    def __init__(self, score_fn: Callable[[Any], Any], fails_at: int | None = None, error: Any = None) -> None:
        self.score_fn, self.fails_at, self.error, self.seen = score_fn, fails_at, error, list[Tensors]()

    def __call__(self, model: nn.Module) -> Any:
        if len(self.seen) == self.fails_at:
            raise self.error
        self.seen.append(copied(model))
        return self.score_fn(model)


def content(path: Path) -> object:
    """A file's bytes; of tensors a hash, as safetensors leaves the order within its header to chance."""
    return zoo.fingerprint(load_file(path)) if path.suffix == ".safetensors" else path.read_bytes()


def files(folder: Path) -> dict[str, object]:
    """All files of a run but the directions' report, which says how long they took."""
    return {
        str(path.relative_to(folder)): content(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lox_report.json"
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_points_are_exact(dtype: torch.dtype) -> None:
    model, base = make_pair(dtype)
    aligned = copied(model)
    shown = Recorder(distance_to(aligned))
    curve = rank_curve(model, base, shown, ranks=RANKS)
    assert [point.r for point in curve.points] == list(RANKS) and curve.matrices == 3
    for point, weights in zip(curve.points, shown.seen[1:], strict=True):
        assert point.score.value("value") == pytest.approx(left_over(point.r), abs=CLOSE)
        for name in ("first.weight", "second.weight"):
            added = sum(direction(base[name].shape, number) for number in range(min(3, point.r)))
            exact = base[name].float() + added  # a few multiples of 1/64: as exact in bfloat16
            assert (weights[name].float() - exact).abs().max() < CLOSE
            if dtype == torch.bfloat16:  # rounded once, so equal wherever there is a number to round to
                assert torch.equal(weights[name].float()[exact != 0], exact[exact != 0])
        for name in ("first.bias", "norm.weight", "table.weight"):  # aligned, at every rank
            assert torch.equal(weights[name], aligned[name])
    whole = left_over(0) ** 2
    shares = [1 - left_over(r) ** 2 / whole for r in RANKS]
    assert [point.energy_share for point in curve.points] == pytest.approx(shares, abs=CLOSE)
    assert curve.aligned_score.value("value") == 0 and left_over(2) > 0.5  # control: there is something to see


def test_the_effective_rank_of_a_made_measure() -> None:
    model, base = make_pair()
    curve = rank_curve(model, base, attacked(copied(model)), ranks=RANKS)
    found = curve.effective
    assert found is not None and (found.by_rule, found.certain, found.n, found.paired) == (3, 3, N, True)
    assert [point.score.rates["asr"].count for point in curve.points] == [
        round(N * left_over(r) / left_over(0)) for r in RANKS
    ]
    assert curve.warnings == ()
    few = rank_curve(model, base, attacked(copied(model)), ranks=RANKS, rho=0.001).effective
    assert few is not None and (few.by_rule, few.certain) == (3, None)  # 300 prompts do not tell 0.1 %


def test_the_model_is_left_as_it_was_found() -> None:
    for error in (RuntimeError("judge"), KeyboardInterrupt(), None):
        model, base = make_pair()
        model.norm.weight.data[0] = -0.0
        before = copied(model)
        shown = Recorder(distance_to(before), fails_at=3, error=error)
        if error is None:
            rank_curve(model, base, Recorder(distance_to(before)), ranks=RANKS, reset_vectors=True)
        else:
            with pytest.raises(type(error)):
                rank_curve(model, base, shown, ranks=RANKS, reset_vectors=True)
            assert not torch.equal(shown.seen[2]["first.weight"], before["first.weight"])  # control: it was changed
        assert zoo.same_bits(copied(model), before)


def test_vectors_are_reset_at_rank_0_only_and_where_asked() -> None:
    model, base = make_pair()
    aligned = copied(model)
    shown = Recorder(distance_to(aligned))
    curve = rank_curve(model, base, shown, LoxConfig(target_modules=["first"]), ranks=(0, 2), reset_vectors=True)
    _, zero, two = shown.seen
    assert curve.reset_vectors and curve.matrices == 1
    assert torch.equal(zero["first.bias"], base["first.bias"]) and torch.equal(
        two["first.bias"], aligned["first.bias"]
    )
    for weights in (zero, two):  # not selected
        assert torch.equal(weights["norm.weight"], aligned["norm.weight"])
        assert torch.equal(weights["second.weight"], aligned["second.weight"])
    everything = Recorder(distance_to(aligned))
    rank_curve(model, base, everything, ranks=(0,), reset_vectors=True)
    assert zoo.same_bits(everything.seen[1], base)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama_tied"])
def test_models_whose_files_name_their_weights_otherwise(kind: str, tmp_path: Path) -> None:
    pair = zoo.save_pair(kind, tmp_path, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(pair.aligned_dir)
    before, seen = copied(model), list[Tensors]()

    def score(model: nn.Module) -> float:
        seen.append({name: weight.clone() for name, weight in live_tensors(model).items()})
        return 1.0

    curve = rank_curve(model, pair.base_dir, score, ranks=(0, 2), aligned_model=pair.aligned_dir)
    aligned, base = pair.aligned(), pair.base()
    assert zoo.same_bits(seen[0], aligned) and zoo.same_bits(copied(model), before)
    for r, weights in zip((0, 2), seen[1:], strict=True):
        for name, theirs in base.items():
            exact = aligned[name].double()
            if theirs.ndim > 1:
                exact = theirs.double() + oracle.project(exact - theirs.double(), r)
            assert (weights[name].double() - exact).abs().max() < CLOSE, name
    assert curve.effective is None and "'asr' is none of what was measured (value)" in curve.warnings[0]
    if kind == "llama_tied":
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_run_that_stopped_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    model, base = make_pair()
    score = attacked(copied(model))
    whole = Recorder(score)
    curve = rank_curve(model, base, whole, ranks=RANKS, output_dir=tmp_path / "whole")
    with pytest.raises(ZeroDivisionError):
        failing = Recorder(score, fails_at=2, error=ZeroDivisionError())
        rank_curve(model, base, failing, ranks=RANKS, output_dir=tmp_path / "killed")
    directions = (tmp_path / "killed" / "subspace" / "lox_report.json").read_bytes()
    rest = Recorder(score)
    assert rank_curve(model, base, rest, ranks=RANKS, output_dir=tmp_path / "killed") == curve
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert len(whole.seen) == 6 and len(rest.seen) == 4  # the aligned model and the base were there
    assert (tmp_path / "killed" / "subspace" / "lox_report.json").read_bytes() == directions  # and the directions
    assert RankCurve.from_json((tmp_path / "whole" / "rank_curve.json").read_text()) == curve
    wider = Recorder(score)
    more = rank_curve(model, base, wider, ranks=(*RANKS, 7), output_dir=tmp_path / "whole")
    assert len(wider.seen) == 1 and more.points[:5] == curve.points and more.points[5].r == 7


KILLED = """
import os, signal, sys
from pathlib import Path
from analysis.known_pair import attacked, make_pair
from lox_hf.analysis.rank_curve import rank_curve
model, base = make_pair()
score, seen = attacked({name: weight.clone() for name, weight in model.state_dict().items()}), []
def dying(model):
    seen.append(1)
    if len(seen) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return score(model)
rank_curve(model, base, dying, ranks=(0, 1, 2, 3, 5), output_dir=sys.argv[1])
"""


def test_a_killed_process_loses_nothing_that_was_done(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    done = subprocess.run(words, env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    model, base = make_pair()
    rest = Recorder(attacked(copied(model)))
    rank_curve(model, base, rest, ranks=RANKS, output_dir=tmp_path / "killed")
    rank_curve(model, base, rest.score_fn, ranks=RANKS, output_dir=tmp_path / "whole")
    assert files(tmp_path / "killed") == files(tmp_path / "whole") and len(rest.seen) == 4


@pytest.mark.parametrize("change", ["about", "config", "base", "aligned"])
def test_points_of_another_run_are_refused_before_any_work(change: str, tmp_path: Path) -> None:
    model, base = make_pair()
    score = attacked(copied(model))
    settings: dict[str, Any] = {"ranks": (0, 1), "output_dir": tmp_path, "about": {"judge": "refusal"}}
    rank_curve(model, base, score, **settings)
    before = files(tmp_path)
    if change == "about":
        settings["about"] = {"judge": "rubric:org/judge"}
    if change == "base":
        base["first.weight"] += 1
    if change == "aligned":
        model.first.weight.data += 1
    config = LoxConfig(target_modules=["first"]) if change == "config" else None
    shown = Recorder(score)
    with pytest.raises(OutputError, match="with other settings"):
        rank_curve(model, base, shown, config, **settings)
    assert files(tmp_path) == before and shown.seen == []


def test_saved_directions_serve_and_are_checked(tmp_path: Path) -> None:
    model, base = make_pair()
    score = distance_to(copied(model))
    found = SafetySubspace.from_models(model, base, LoxConfig(r=5, target_modules=["first", "second"]))
    curve = rank_curve(model, base, score, ranks=(0, 1, 3), subspace=found, output_dir=tmp_path / "run")
    assert curve.matrices == 2 and not (tmp_path / "run" / "subspace").exists()
    assert [point.score.value("value") for point in curve.points] == pytest.approx(
        [left_over(0), left_over(1), 0], abs=CLOSE
    )
    with pytest.raises(PairingError, match=r"table: not in the subspace|table.weight: not in the subspace"):
        rank_curve(model, base, score, LoxConfig(), ranks=(0, 1), subspace=found)
    shallow = SafetySubspace.from_models(model, base, LoxConfig(r=1))
    with pytest.raises(PairingError, match="r = 3 against 1 stored directions"):
        rank_curve(model, base, score, ranks=(0, 3), subspace=shallow)
    other = {name: weight + torch.rand(weight.shape) for name, weight in base.items()}
    strange = SafetySubspace.from_models(model, other, LoxConfig(r=5))
    with pytest.raises(PairingError, match="was made from other models than"):
        rank_curve(model, base, score, ranks=(0, 1), subspace=strange)


def test_directions_of_other_models_in_the_folder_are_made_anew(tmp_path: Path) -> None:
    model, base = make_pair()
    score = distance_to(copied(model))
    rank_curve(model, base, score, ranks=(0, 1), output_dir=tmp_path)
    file = tmp_path / "subspace" / "lox_subspace.safetensors"
    tensors = load_file(file)
    names = json.dumps([name.removesuffix(".U") for name in tensors if name.endswith(".U")])
    save_file({name: part.flip(0).contiguous() for name, part in tensors.items()}, file, {"matrices": names})
    (tmp_path / "points" / "rank-1.json").unlink()
    curve = rank_curve(model, base, score, ranks=(0, 1), output_dir=tmp_path)
    assert zoo.same_bits(load_file(file), tensors)
    assert curve.points[1].score.value("value") == pytest.approx(left_over(1), abs=CLOSE)
    file.write_bytes(file.read_bytes()[:100])
    assert rank_curve(model, base, score, ranks=(0, 1), output_dir=tmp_path) == curve


def test_wrong_settings_come_in_one_message() -> None:
    model, base = make_pair()
    pattern = LoxConfig(rank_pattern={"first": 2})
    with pytest.raises(ConfigError, match=r"ranks must be .*0\.9.*; rho must lie in .*; rank_pattern would"):
        rank_curve(model, base, len, pattern, ranks=(1, 0.9), rho=1)  # pyrefly: ignore[bad-argument-type]
    for ranks in ((), (-1,), (True,), 3, "12"):
        with pytest.raises(ConfigError, match="ranks must be whole numbers from 0"):
            rank_curve(model, base, len, ranks=ranks)  # pyrefly: ignore[bad-argument-type]
    assert [point.r for point in rank_curve(model, base, lambda _: 1.0, ranks=(2, 0, 2)).points] == [0, 2]


def cut(base: Tensors) -> Any:
    return {**base, "first.weight": base["first.weight"][:8]}


WRONG: dict[str, tuple[Callable[[Tensors], Any], dict[str, Any], type[LoxError], str]] = {
    "shapes": (cut, {}, PairingError, r"1 tensors differ. first.weight: \(16, 24\) against \(8, 24\)"),
    "no base": (lambda _: None, {}, ConfigError, "No base model is named"),
    "no folder": (lambda _: "/nowhere/at/all", {}, LoxError, "/nowhere/at/all"),
    "vectors": (
        lambda base: {**base, "norm.bias": torch.zeros(9)},
        {"reset_vectors": True},
        PairingError,
        r"1 weights .* norm.bias: \(8,\) against \(9,\)",
    ),
    "too deep": (dict, {"ranks": (0, 100)}, ConfigError, "r exceeds the smaller side"),
    "no module": (dict, {"config": LoxConfig(target_modules=["third"])}, ConfigError, "'third' matches no module"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_are_refused_before_any_work(case: str) -> None:
    change, settings, error, words = WRONG[case]
    model, base = make_pair()
    shown = Recorder(lambda _: 1.0)
    with pytest.raises(error, match=words):
        rank_curve(model, change(base), shown, **settings)
    assert shown.seen == []


def test_models_that_are_equal_have_no_curve() -> None:
    model, _ = make_pair()
    with pytest.raises(PairingError, match="equal in every selected tensor"):
        rank_curve(model, copied(model), lambda _: 1.0)


def test_directions_are_no_base() -> None:
    model, base = make_pair()
    found: Any = SafetySubspace.from_models(model, base, LoxConfig(r=8))
    with pytest.raises(ConfigError, match="pass the base as base_model, and the directions as subspace"):
        rank_curve(model, found, lambda _: 1.0)


def test_a_score_that_is_none_is_refused() -> None:
    model, base = make_pair()
    with pytest.raises(ConfigError, match="got str without any"):
        rank_curve(model, base, lambda _: "safe", ranks=(0,))


def test_a_measure_that_is_not_known_gives_no_effective_rank() -> None:
    model, base = make_pair()
    empty = Score({"asr": attacked(copied(model))(model).rates["asr"]}, {"kl": math.nan})
    curve = rank_curve(model, base, lambda _: empty, ranks=(0,), measure="kl")
    assert curve.effective is None and "'kl' is none of" in curve.warnings[0]


def test_a_matrix_with_no_more_directions_is_the_aligned_one() -> None:
    model, base = make_pair()
    base["first.weight"] += torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
    aligned, shown = copied(model), Recorder(lambda _: 1.0)
    rank_curve(model, base, shown, ranks=(15, 16, 20))  # 16 is its smaller side
    moved = [(weights["first.weight"] - aligned["first.weight"]).abs().max() for weights in shown.seen[1:]]
    assert moved[0] > 0.01 > CLOSE > max(moved[1:])
