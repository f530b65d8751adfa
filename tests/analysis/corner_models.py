"""Models of whom it is known where they lie, as state dicts of one zoo model, and the definition in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor

import zoo

State = dict[str, Tensor]


def change(state: State, seed: int, size: float = 0.01) -> State:
    """Random numbers of a state's shapes, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(t.shape, generator=generator, dtype=torch.float64) for name, t in state.items()}


def moved(state: State, *steps: tuple[float, State], dtype: torch.dtype = torch.float32) -> State:
    """state + sum of a * step, computed in float64 and rounded once."""
    return {
        name: (tensor.double() + sum(a * step[name] for a, step in steps)).to(dtype) for name, tensor in state.items()
    }


def dot(left: State, right: State) -> float:
    return float(sum((left[name].double() * right[name].double()).sum() for name in left))


def minus(left: State, right: State) -> State:
    return {name: left[name].double() - right[name].double() for name in left}


def scaled(state: State, factor: float) -> State:
    return {name: factor * tensor for name, tensor in state.items()}


def orthonormal(first: State, second: State) -> tuple[State, State]:
    """Gram-Schmidt over the whole vector, dense, in float64."""
    e_1 = scaled(first, dot(first, first) ** -0.5)
    rest = {name: second[name] - dot(second, e_1) * e_1[name] for name in second}
    return e_1, scaled(rest, dot(rest, rest) ** -0.5)


def dense_axes(states: Sequence[State]) -> tuple[State, State]:
    """The axes of a landscape by their definition."""
    m1, m2, m3, m4 = states
    first, third, fourth = minus(m2, m1), minus(m3, m1), minus(m4, m2)
    return orthonormal(first, {name: (third[name] + fourth[name]) / 2 for name in first})


def zoo_state(kind: str) -> State:
    """The floating tensors of a zoo model, in checkpoint names and float32."""
    return {name: tensor.float() for name, tensor in zoo.make_tensors(kind, dtype=torch.float32)[0].items()}


def rectangle(state: State, width: float = 2.0, height: float = 3.0) -> tuple[list[State], tuple[State, State]]:
    """Four models at (0, 0), (w, 0), (0, h) and (w, h) of two orthonormal axes, and the axes."""
    e_1, e_2 = orthonormal(change(state, 1), change(state, 2))
    return [
        moved(state),
        moved(state, (width, e_1)),
        moved(state, (height, e_2)),
        moved(state, (width, e_1), (height, e_2)),
    ], (e_1, e_2)
