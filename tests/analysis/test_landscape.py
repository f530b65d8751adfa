"""Landscapes of measures with a closed form, on models whose places are known; killed runs, and wrong inputs."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from analysis.corner_models import State, change, dot, minus, moved, rectangle, zoo_state
from lox_hf.analysis.corners import open_corners
from lox_hf.analysis.landscape import landscape
from lox_hf.errors import ConfigError, NumericsError, OutputError, PairingError
from lox_hf.records import Landscape
from lox_hf.statistics import rate
from lox_hf.weights.live import live_tensors
from lox_hf.weights.source import CheckpointSource, DictSource

# Coordinates of up to 50,000 weights of size 1 that are rounded to float32 after at most four terms.
ROUNDED = 2e-5
ENDS: list[State] = [{"weight": torch.tensor([[value, 0.0]])} for value in (1.0, 3.0)]


def weights(model: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in live_tensors(model).items()}


def value(model: nn.Module) -> float:
    return weights(model)["weight"][0, 0].item()


@pytest.mark.parametrize("kind", ["llama_tied", "qwen2", "gpt_oss"])
def test_measures_with_a_closed_form_come_out_on_every_point(kind: str) -> None:
    """Vectors, a tied head and fused experts take part: a linear and a quadratic function of all weights."""
    states, (e_1, e_2) = rectangle(zoo_state(kind))
    target = moved(states[0], (0.3, e_1), (1.0, change(states[0], 5)), dtype=torch.float64)
    model = zoo.make_model(kind)
    before = weights(model)

    def score(place: nn.Module) -> dict[str, float]:
        found = weights(place)
        offset, away = minus(found, states[0]), minus(found, target)
        return {"x": dot(offset, e_1), "y": dot(offset, e_2), "quadratic": dot(away, away)}

    found = landscape(model, states, score, grid=(4, 3), margin=0.5, measure="quadratic")
    assert found.xs == pytest.approx([-1, 1 / 3, 5 / 3, 3], abs=ROUNDED)
    assert found.ys == pytest.approx([-1.5, 1.5, 4.5], abs=ROUNDED)
    assert [(point.x, point.y) for point in found.points] == [(x, y) for x in found.xs for y in found.ys]
    at_origin = minus(states[0], target)
    for place in (*found.points, *found.models):
        x, y = place.x, place.y
        linear = dot(at_origin, at_origin) + 2 * (x * dot(at_origin, e_1) + y * dot(at_origin, e_2))
        assert place.score.value("x") == pytest.approx(x, abs=ROUNDED)
        assert place.score.value("y") == pytest.approx(y, abs=ROUNDED)
        assert place.score.value("quadratic") == pytest.approx(linear + x**2 + y**2, rel=ROUNDED)
    assert found.parameters == sum(tensor.numel() for tensor in before.values() if tensor.is_floating_point())
    assert zoo.same_bits(weights(model), before)  # left as found


def test_models_are_measured_bit_for_bit_and_once() -> None:
    states, _ = rectangle(zoo_state("qwen2"))
    states = [{name: tensor.bfloat16() for name, tensor in state.items()} for state in states]
    states[3] = moved(states[3], (1.0, change(states[3], 3)), dtype=torch.bfloat16)
    seen: list[str] = []

    def score(place: nn.Module) -> float:
        seen.append(zoo.fingerprint(weights(place)))
        return 0.0

    found = landscape(zoo.make_model("qwen2", dtype=torch.bfloat16), states, score, measure="value")
    assert seen[:4] == [zoo.fingerprint(state) for state in states]
    on_grid = [(m.x, m.y) for m in found.models[:2] if m.x in found.xs and m.y in found.ys]
    assert len(set(seen)) == len(seen) == 4 + 49 - len(on_grid)  # what is a model is not measured again
    assert [model.is_beside for model in found.models] == [False, False, True, True]
    assert len([text for text in found.warnings if "projection" in text]) == 2


def test_the_default_grid_goes_through_the_outermost_models() -> None:
    found = landscape(nn.Linear(2, 1, bias=False), ENDS, value, measure="value")
    assert found.xs == (-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5) and found.ys == (0.0,)
    assert [point.score.value("value") for point in found.points] == [0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert found.basins == () and "no rate" in found.warnings[0]


def test_a_rate_has_basins() -> None:
    def score(place: nn.Module) -> dict[str, Any]:
        return {"asr": rate(min(10, round(4 * (value(place) - 1)) if value(place) > 1 else 0), 10)}

    found = landscape(nn.Linear(2, 1, bias=False), ENDS, score)
    first, second = found.basins  # rates of the grid: 0, 0, .2, .4, .6, .8, 1; the radius is 1
    assert (first.center, first.radius, first.n_points) == ("a state dict (1)", 1.0, 4)
    assert (first.visage, first.worst) == pytest.approx((85.0, 0.4))
    assert second.n_points == 4 and second.visage == pytest.approx((60 + 40 + 20) / 3)
    assert landscape(nn.Linear(2, 1, bias=False), ENDS, score, radius=0.1).basins[0].n_points == 1


def test_the_place_may_be_one_of_the_models() -> None:
    for as_model in (lambda model: model, lambda model: model.state_dict()):
        model = nn.Linear(2, 1, bias=False)
        model.load_state_dict(ENDS[0])
        found = landscape(model, [as_model(model), ENDS[1]], value, grid=(3, 1), margin=0.0, measure="value")
        assert [point.score.value("value") for point in found.points] == [1.0, 2.0, 3.0]
        assert torch.equal(model.weight, ENDS[0]["weight"])


def test_no_copy_is_kept_where_the_first_models_files_hold_the_place(tmp_path: Path) -> None:
    pair = zoo.save_pair("qwen2", tmp_path, dtype=torch.float32)
    model = type(zoo.make_model("qwen2")).from_pretrained(pair.aligned_dir)
    there = open_corners(model, [pair.aligned_dir, pair.base_dir])
    assert isinstance(there.place.source, CheckpointSource)
    other = open_corners(model, [pair.base_dir, pair.aligned_dir])
    assert isinstance(other.place.source, DictSource) and zoo.same_bits(other.place.source.tensors, pair.aligned())
    assert other.plane.length == there.plane.length


def stopping_after(count: int) -> Callable[[nn.Module], float]:
    left = iter(range(count))

    def score(place: nn.Module) -> float:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return value(place)

    return score


def test_a_killed_run_goes_on_and_comes_to_the_same_bytes(tmp_path: Path) -> None:
    model = nn.Linear(2, 1, bias=False)
    before = weights(model)
    whole = landscape(model, ENDS, value, measure="value", output_dir=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        landscape(model, ENDS, stopping_after(4), measure="value", output_dir=tmp_path / "out")
    assert zoo.same_bits(weights(model), before) and not (tmp_path / "out" / "landscape.json").exists()
    landscape(model, ENDS, stopping_after(3), measure="value", output_dir=tmp_path / "out")  # 2 + 5 in all
    files = {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.json")}
    assert len(files) == 2 + 5 + 2
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert Landscape.from_json((tmp_path / "out" / "landscape.json").read_text()) == whole


def test_a_folder_takes_a_finer_grid_but_no_other_models_or_measure(tmp_path: Path) -> None:
    model, out = nn.Linear(2, 1, bias=False), tmp_path / "out"
    landscape(model, ENDS, value, measure="value", output_dir=out, about={"n": 1})
    landscape(model, ENDS, stopping_after(6), grid=(13, 1), measure="value", output_dir=out, about={"n": 1})
    for models, about in ((ENDS, {"n": 2}), ([ENDS[0], {"weight": torch.ones(1, 2)}], {"n": 1})):
        with pytest.raises(OutputError, match="other settings"):
            landscape(model, models, value, measure="value", output_dir=out, about=about)


def refused(models: list[Any], error: type[Exception] = PairingError, **settings: Any) -> str:
    asked: list[nn.Module] = []
    with pytest.raises(error) as raised:
        landscape(nn.Linear(2, 1, bias=False), models, asked.append, **settings)
    assert not asked
    return str(raised.value)


def test_settings_that_cannot_be_meant_are_told_at_once() -> None:
    wrong = {"grid": (1, 7), "margin": math.nan, "radius": -1.0, "revisions": ["main"]}
    text = refused([*ENDS, ENDS[0]], ConfigError, **wrong)
    for words in (
        "3 models are named, expected 2",
        "grid is (1, 7)",
        "margin is nan",
        "radius is -1.0",
        "1 revisions",
    ):
        assert words in text
    assert "4 models" not in text


def test_models_that_do_not_fit_are_told_at_once() -> None:
    others = [
        {"weight": torch.ones(1, 3)},
        {"weight": torch.ones(1, 2, dtype=torch.bfloat16), "extra": torch.ones(3)},
        {"weights": torch.ones(1, 2)},
    ]
    text = refused([ENDS[0], *others])
    assert "weight: (1, 2) in m1 (a state dict) against (1, 3) in m2 (a state dict)" in text
    assert "weight: float32 in m1 (a state dict) against bfloat16 in m3" in text and "same precision" in text
    assert "weight: missing in m4" in text and "extra: missing in m1" in text and "5 differences" in text
    assert "(1, 2) in the loaded model against (1, 3) in m1" in refused([others[0], others[0]])
    assert "different architectures" in refused([others[2], others[2]])


def test_models_that_span_nothing() -> None:
    same = refused([ENDS[0], dict(ENDS[0]), ENDS[1], {"weight": torch.tensor([[0.0, 2.0]])}])
    assert "m1 (a state dict) and m2 (a state dict) hold the same weights" in same
    points = [{"weight": torch.tensor([[x, 0.0]])} for x in (0.0, 1.0, 2.0, 4.0)]
    assert "collinear" in refused(points)
    broken = {"weight": torch.tensor([[math.nan, 1.0]])}
    assert "weight of m2" in refused([ENDS[0], broken], NumericsError)


def test_a_measure_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="'asr' was not measured; there are value"):
        landscape(nn.Linear(2, 1, bias=False), ENDS, value)
