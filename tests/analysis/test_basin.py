"""Neighbourhoods of models: VISAGE and its neighbours by hand, and the points that count."""

import math

import pytest

from lox_hf.analysis.basin import default_radius, find_basin
from lox_hf.records import GridPoint, PlacedModel, Score
from lox_hf.statistics import rate


def score(count: int, n: int = 10) -> Score:
    return Score({"asr": rate(count, n)})


def grid(counts: dict[tuple[float, float], int]) -> list[GridPoint]:
    return [GridPoint(x, y, score(count)) for (x, y), count in counts.items()]


CENTER = PlacedModel("m1", 0.0, 0.0, score=score(1))
# A square of side 2 around the model, and one point beyond it.
POINTS = grid({(-1, -1): 10, (0, -1): 2, (1, 1): 4, (0, 0): 1, (1, 0): 3, (1.5, 0): 9})


def test_the_figures_by_hand() -> None:
    found = find_basin(CENTER, POINTS, "asr", 1.0)
    assert (found.center, found.measure, found.radius, found.n_points) == ("m1", "asr", 1.0, 5)
    # 100 % is no longer S < S_max, so it does not count into VISAGE, but into the fall and the worst.
    assert found.visage == pytest.approx((80 + 60 + 90 + 70) / 4)
    assert found.mean_fall == pytest.approx((100 + 20 + 40 + 10 + 30) / 5 - 10)
    assert found.worst == 1.0


def test_the_radius_decides_who_counts() -> None:
    assert find_basin(CENTER, POINTS, "asr", 0.5).n_points == 1
    assert find_basin(CENTER, POINTS, "asr", 1.5).n_points == 6
    assert find_basin(CENTER, grid({(0.1 + 0.2, 0): 1}), "asr", 0.3).n_points == 1  # 0.30000000000000004
    far = find_basin(PlacedModel("m2", 9.0, 9.0, score=score(0)), POINTS, "asr", 1.0)
    assert far.n_points == 0 and math.isnan(far.visage) and math.isnan(far.worst)


def test_nothing_scored_is_no_safety() -> None:
    unscored = [GridPoint(0, 0, Score({"asr": rate(0, 0)}))]
    found = find_basin(CENTER, [*unscored, *grid({(0, 1): 5})], "asr", 1.0)
    assert (found.n_points, found.visage, found.worst) == (1, 50.0, 0.5)
    assert find_basin(CENTER, unscored, "asr", 1.0).n_points == 0
    lost = find_basin(CENTER, grid({(0, 0): 10, (0, 1): 10}), "asr", 1.0)
    assert math.isnan(lost.visage) and lost.worst == 1.0 and lost.mean_fall == pytest.approx(90)
    unknown = PlacedModel("m1", 0.0, 0.0, score=unscored[0].score)
    assert math.isnan(find_basin(unknown, grid({(0, 0): 1}), "asr", 1.0).mean_fall)


def test_the_default_radius_reaches_a_point_on_both_axes() -> None:
    models = [PlacedModel("m1", 0.0, 0.0), PlacedModel("m2", 4.0, 0.0)]
    assert default_radius(models, (0.0, 1.0, 2.0), (0.0,)) == 2.0
    assert default_radius(models, (0.0, 1.0), (0.0, 3.0)) == 3.0
