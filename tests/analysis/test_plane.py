"""The plane through models, from inner products alone, against the definition in float64."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.corner_models import (
    State,
    change,
    dense_axes,
    dot,
    minus,
    moved,
    rectangle,
    zoo_state,
)
from lox_hf.analysis.plane import COLLINEAR, Plane, inner_products
from lox_hf.errors import NumericsError, PairingError
from lox_hf.weights.source import DictSource

SHAPES = {"matrix": (5, 7), "vector": (6,), "experts": (2, 3, 4), "number": ()}
# float32 rounds weights of size 1 by up to 6e-8, and there are up to 7,000 of them on a distance of 2.
ROUNDED = 1e-5


def sources(states: list[State]) -> list[DictSource]:
    return [DictSource(state, f"m{number}") for number, state in enumerate(states, start=1)]


def plane_of(states: list[State]) -> Plane:
    return Plane.of(inner_products(sources(states), list(states[0])).gram)


def start() -> State:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**16), sizes=st.lists(st.floats(-2, 2), min_size=9, max_size=9))
def test_coordinates_are_those_of_the_dense_definition(seed: int, sizes: list[float]) -> None:
    steps = [change(start(), seed + number, 1.0) for number in range(3)]
    mixes = [sizes[:3], sizes[3:6], sizes[6:]]
    states = [
        start(),
        *(moved(start(), *zip(mix, steps, strict=True), (0.1, steps[n])) for n, mix in enumerate(mixes)),
    ]
    try:
        plane = plane_of(states)
    except PairingError:
        return
    if plane.height < 0.05 * plane.length or plane.length < 0.05:
        return  # the definition itself is ill-conditioned
    axes = dense_axes(states)
    for (x, y), beside, state in zip(plane.coordinates, plane.beside, states, strict=True):
        difference = minus(state, states[0])
        assert (x, y) == pytest.approx([dot(axis, difference) for axis in axes], abs=1e-9)
        energy = dot(difference, difference)
        assert x**2 + y**2 + beside**2 == pytest.approx(energy, abs=1e-9 * max(1.0, energy))
    assert plane.beside[2] == pytest.approx(plane.beside[3], abs=1e-6)  # what is left of both is opposite


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**16), x=st.floats(-3, 3), y=st.floats(-3, 3))
def test_a_point_is_a_sum_of_the_models(seed: int, x: float, y: float) -> None:
    states = [start(), *(moved(start(), (1.0, change(start(), seed + number, 1.0))) for number in range(3))]
    weights = plane_of(states).coefficients(x, y)
    axes = dense_axes(states)
    assert math.fsum(weights) == pytest.approx(1, abs=1e-12)
    for name in SHAPES:
        formed = sum(c * state[name].double() for c, state in zip(weights, states, strict=True))
        wanted = states[0][name].double() + x * axes[0][name] + y * axes[1][name]
        assert torch.allclose(formed, wanted, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama_tied", "qwen2", "gpt_oss"])
def test_four_models_of_a_rectangle_fall_on_its_corners(kind: str) -> None:
    states, _ = rectangle(zoo_state(kind))
    found = inner_products(sources(states), list(states[0]))
    plane = Plane.of(found.gram)
    assert found.parameters == sum(tensor.numel() for tensor in states[0].values()) and found.same == ()
    for place, wanted in zip(plane.coordinates, [(0, 0), (2, 0), (0, 3), (2, 3)], strict=True):
        assert place == pytest.approx(wanted, abs=ROUNDED)
    assert max(plane.beside) < ROUNDED
    states[3] = moved(states[3], (1.0, change(states[3], 9)))
    assert plane_of(states).beside[3] > 0.1  # control: whoever leaves the plane is told


@settings(deadline=None)
@given(length=st.floats(1e-3, 1e3), shear=st.floats(-50, 50), height=st.floats(1e-3, 1e3))
def test_at_the_first_two_models_nothing_is_mixed(length: float, shear: float, height: float) -> None:
    places = ((0.0, 0.0), (length, 0.0))
    plane = Plane(length, shear, height, places, (0.0,) * 4)
    assert plane.coefficients(*places[0]) == (1, 0, 0, 0)
    assert plane.coefficients(*places[1]) == (0, 1, 0, 0)
    line = Plane(length, 0.0, 0.0, places, (0.0, 0.0))
    assert (line.coefficients(0.0), line.coefficients(length)) == ((1, 0), (0, 1))


def test_two_models_span_a_line() -> None:
    m1 = {"w": torch.zeros(3, 3), "b": torch.zeros(4)}
    m2 = {"w": torch.ones(3, 3), "b": torch.full((4,), 2.0)}
    plane = plane_of([m1, m2])
    assert (plane.length, plane.height, plane.coordinates) == (5.0, 0.0, ((0.0, 0.0), (5.0, 0.0)))
    assert plane.coefficients(1.0) == (0.8, 0.2)


def test_many_tiles_and_half_precision() -> None:
    states = [{"w": value * torch.ones(300, 1000, dtype=torch.bfloat16)} for value in (1.0, 1.5, 2.0, 4.0)]
    found = inner_products(sources(states), ["w"])
    steps = [0.5, 1.0, 3.0]
    assert found.gram == tuple(tuple(300_000 * a * b for b in steps) for a in steps)  # exact in float64


def test_weights_that_are_the_same_are_found() -> None:
    m1, other = start(), moved(start(), (1.0, change(start(), 1)))
    last = {**other, "number": other["number"] + 1e-6}
    found = inner_products(sources([m1, other, m1, last]), list(SHAPES))
    assert found.same == ((0, 2),)  # and a single number makes another model
    assert inner_products(sources([m1, other, m1, dict(other)]), list(SHAPES)).same == ((0, 2), (1, 3))


def directions(**wanted: Any) -> list[list[float]]:
    """The Gram matrix of three differences in coordinates."""
    rows = torch.tensor([wanted[name] for name in ("d2", "d3", "d4")], dtype=torch.float64)
    return (rows @ rows.T).tolist()


@pytest.mark.parametrize(
    ("gram", "words"),
    [
        ([[0.0]], "the first direction, m2 - m1, has zero length"),
        (directions(d2=[1, 0], d3=[0, 1], d4=[1, -1]), "has zero length: what was done to m1 and to m2 cancels"),
        (directions(d2=[1, 0], d3=[2, 0], d4=[3, 0]), "is collinear with the first"),
        (directions(d2=[1, 0], d3=[2, 1e-5], d4=[3, 1e-5]), "is collinear with the first"),
    ],
)
def test_what_spans_nothing_is_refused(gram: list[list[float]], words: str) -> None:
    with pytest.raises(PairingError) as error:
        Plane.of(gram)
    assert words in str(error.value)


def test_nearly_collinear_is_no_mistake() -> None:
    tall = 10 * COLLINEAR
    plane = Plane.of(directions(d2=[1, 0], d3=[2, 2 * tall], d4=[3, 2 * tall]))
    assert plane.height == pytest.approx(2 * tall, rel=1e-4)


def test_weights_that_are_not_finite_are_named_all_at_once() -> None:
    states = [moved(start(), (float(number), change(start(), number))) for number in range(4)]
    states[1]["vector"][2] = math.nan
    states[3]["experts"][0, 0, 0] = math.inf
    with pytest.raises(NumericsError) as error:
        plane_of(states)
    assert "vector of m2" in str(error.value) and "experts of m4" in str(error.value)
    assert "2 tensors" in str(error.value)
