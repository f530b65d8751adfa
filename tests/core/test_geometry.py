"""Retention and projected share against their definitions in float64, and the cases where they are not defined."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import exact, pair
from torch import Tensor

from lox_hf.core.delta import TILE_ELEMENTS, Delta
from lox_hf.core.geometry import Projection, project
from lox_hf.core.lowrank import LowRank, decompose
from lox_hf.errors import NumericsError

VALUES = [0.5, 0.4, 0.3, 0.1, 0.05]
NOISE = 1e-3
SHAPES = [(1200, 600), (600, 1200), (90, 40), (5, 8)]
FLOAT32_ERROR = 1e-5  # float32 products over a thousand rows


def directions_of(aligned: Tensor, base: Tensor, k: int) -> LowRank:
    return decompose(Delta(aligned, base), k, svd="exact").factors


def definition(weight: Tensor, aligned: Tensor, base: Tensor, k: int) -> tuple[float, float]:
    """Retention and R by the definitions, with U and V of the exact decomposition in float64."""
    u, s, vh = exact(aligned, base)
    u, s, vh = u[:, :k], s[:k], vh[:k]
    change = weight.double() - base.double()
    component = (u.T @ change @ vh.T * torch.diag(s)).sum()
    return (component / s.square().sum()).item(), ((u @ u.T @ change).norm() / change.norm()).item()


def measured(weight: Tensor, base: Tensor, directions: LowRank) -> tuple[float, float]:
    found = project(Delta(weight, base), directions)
    return found.retention, found.share


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_definition_in_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    aligned, base = pair(shape, VALUES, noise=NOISE, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    moved = torch.randn(shape, generator=generator)
    moved *= 0.5 * (aligned.float() - base.float()).norm() / moved.norm()
    weight = (aligned.float() + moved).to(dtype)
    expected = definition(weight, aligned, base, 3)
    assert measured(weight, base, directions_of(aligned, base, 3)) == pytest.approx(expected, abs=FLOAT32_ERROR)
    assert abs(expected[1] - definition(aligned, aligned, base, 3)[1]) > 100 * FLOAT32_ERROR  # control: it moved


def test_a_shape_of_these_has_several_tiles() -> None:
    assert max(rows * columns for rows, columns in SHAPES) > TILE_ELEMENTS


@given(scale=st.floats(-2, 3).filter(lambda scale: abs(scale) > 1e-2), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_a_multiple_of_the_change_has_that_retention_and_the_share_of_the_change(scale: float, seed: int) -> None:
    aligned, base = pair((60, 40), VALUES, noise=NOISE, seed=seed)
    base = torch.zeros_like(base)  # so that the multiple is exact
    found = decompose(Delta(aligned, base), 3, svd="exact")
    retention, share = measured(scale * aligned, base, found.factors)
    assert retention == pytest.approx(scale, abs=FLOAT32_ERROR)
    assert share == pytest.approx(math.sqrt(found.energy_share), abs=FLOAT32_ERROR)


def test_what_leaves_the_directions_alone_leaves_retention_alone() -> None:
    aligned, base = pair((60, 40), VALUES, noise=NOISE)
    directions = directions_of(aligned, base, 3)
    u, vh = directions.U, directions.Vh
    other = torch.randn(60, 40, generator=torch.Generator().manual_seed(1)) * 0.05
    outside = other - u @ (u.T @ other)  # another left space
    elsewhere = u @ (u.T @ other) - u @ (u.T @ other) @ vh.T @ vh  # the same left space, other right directions
    retention, share = measured(aligned, base, directions)
    assert retention == pytest.approx(1, abs=FLOAT32_ERROR)
    less, more = measured(aligned + outside, base, directions), measured(aligned + elsewhere, base, directions)
    assert less[0] == pytest.approx(1, abs=FLOAT32_ERROR) and less[1] < share - 0.01
    assert more[0] == pytest.approx(1, abs=FLOAT32_ERROR) and more[1] > share + 1e-4
    along = measured(aligned + 0.1 * directions.dense(), base, directions)
    assert along[0] == pytest.approx(1.1, abs=FLOAT32_ERROR)  # control: the directions themselves count


def test_the_sign_of_a_direction_does_not_matter() -> None:
    aligned, base = pair((60, 40), VALUES, noise=NOISE)
    directions = directions_of(aligned, base, 3)
    sign = torch.tensor([1.0, -1.0, -1.0])
    flipped = LowRank(directions.U * sign, directions.S, sign[:, None] * directions.Vh)
    assert measured(aligned, base, flipped) == pytest.approx(measured(aligned, base, directions))
    half = LowRank(directions.U * sign, directions.S, directions.Vh)  # control: of one side alone it does
    assert measured(aligned, base, half)[0] < 0.9


def test_no_change_retains_nothing_and_points_nowhere() -> None:
    aligned, base = pair((60, 40), VALUES)
    found = project(Delta(base, base), directions_of(aligned, base, 3))
    assert (found.retention, found.norm) == (0.0, 0.0)
    assert math.isnan(found.share)


def test_without_directions_nothing_is_defined() -> None:
    base, weight = torch.zeros(60, 40), torch.ones(60, 40)
    found = project(Delta(weight, base), directions_of(base, base, 3))
    assert math.isnan(found.retention) and math.isnan(found.share)
    assert found.norm == pytest.approx(math.sqrt(2400))  # the change itself was measured


def test_rounding_does_not_lift_a_share_above_one() -> None:
    assert Projection(component=1.0, reference=1.0, projected_norm=1.0000001, norm=1.0).share == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_is_refused(value: float) -> None:
    aligned, base = pair((60, 40), VALUES)
    directions = directions_of(aligned, base, 3)
    project(Delta(aligned, base), directions)  # control
    aligned[-1, -1] = value
    with pytest.raises(NumericsError, match="NaN or Inf"):
        project(Delta(aligned, base), directions)


def test_weights_that_are_trained_are_read_without_a_graph() -> None:
    aligned, base = pair((60, 40), VALUES)
    directions = directions_of(aligned, base, 3)
    expected = measured(aligned, base, directions)
    assert measured(aligned.requires_grad_(), base, directions) == expected

    def left_behind(weight: Tensor) -> bool:
        """Whether the reused buffer, which every thread has of its own, carries a graph afterwards."""
        next(Delta(weight, base).tiles())
        return next(Delta(base, base).tiles())[1].requires_grad

    assert not left_behind(base)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(left_behind, aligned).result()  # control: a weight that is read without care leaves one
