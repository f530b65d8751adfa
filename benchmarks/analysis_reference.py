"""The other side of `analysis.py`: what the reference's scripts for both do, but for scoring.

Written from the description of what they do, none of their code. Run as a child process.

- Rank curve: both models loaded in bfloat16, all deltas held, one full SVD a matrix in float32, all U, S, Vh held;
  at each rank, from the largest, a dense product of the full factors is added to the base, and the whole state dict is
  loaded back.
- Landscape: four models loaded in float32, their differences, means and Gram-Schmidt directions as whole state dicts;
  every point is a new state dict, whose coordinates are computed anew and printed, and which is loaded back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import product
from typing import Any

from measure import serve_job

Weights = dict[str, Any]


def rank_curve(aligned: str, base: str, ranks: list[int]) -> dict[str, Any]:
    """Decompose everything, and form the base with every number of directions."""
    import torch

    before_model, model = (_load(folder, torch.bfloat16) for folder in (base, aligned))
    clock = _Clock()
    with torch.no_grad():
        before, after = before_model.state_dict(), model.state_dict()
        deltas = {name: after[name] - before[name] for name in before}
        found = {
            name: torch.linalg.svd(delta.float(), full_matrices=False) if delta.dim() > 1 else None
            for name, delta in deltas.items()
        }
        clock.lap("decompose")
        for r in sorted(ranks, reverse=True):
            formed = {name: _at_rank(r, before[name], deltas[name], found[name]) for name in before}
            model.load_state_dict(formed)
        clock.lap("form")
    return {"points": len(ranks), **clock.result()}


def landscape(models: list[str], grid: list[int], xs: list[float], ys: list[float]) -> dict[str, Any]:
    """Find the axes, and form every point of the grid; the grid's lines are those of ours."""
    import torch

    loaded = [_load(folder, torch.float32) for folder in models]
    clock = _Clock()
    with torch.no_grad():
        first, second, third, fourth = (model.state_dict() for model in loaded)
        along = _subtract(second, first)
        up = _each(lambda a, b: (a + b) / 2, _subtract(third, first), _subtract(fourth, second))
        share = _dot(along, up) / _dot(along, along)
        up = _each(lambda a, b: b - share * a, along, up)
        lengths = [_dot(axis, axis).sqrt() for axis in (along, up)]
        axes = [
            {name: part / length for name, part in axis.items()}
            for axis, length in zip((along, up), lengths, strict=True)
        ]
        places = [(0.0, 0.0)]
        for other in (second, third, fourth):
            moved = _subtract(other, first)
            places.append(tuple(_dot(axis, moved).item() for axis in axes))
        clock.lap("axes")
        del along, up, moved, other, second, third, fourth
        place = loaded[1].to(torch.bfloat16)  # as a model is scored
        for x, y in product(xs, ys):
            formed = {name: part + x * axes[0][name] + y * axes[1][name] for name, part in first.items()}
            clock.lap("form")
            moved = _subtract(formed, first)  # it prints where every point lies
            [_dot(axis, moved).item() for axis in axes]
            del moved
            clock.lap("check")
            place.load_state_dict(formed)
            clock.lap("form")
    return {"points": len(xs) * len(ys), "places": places, **clock.result()}


class _Clock:
    """CPU-seconds of the parts of the work, imports and loading left out."""

    def __init__(self) -> None:
        self._begin = self._last = time.process_time()
        self._parts: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.process_time()
        self._parts[name] = self._parts.get(name, 0.0) + now - self._last
        self._last = now

    def result(self) -> dict[str, Any]:
        return {"cpu_s": self._last - self._begin, "parts_cpu_s": self._parts}


def _load(folder: str, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def _at_rank(r: int, before: Any, delta: Any, found: Any) -> Any:
    """The base with r directions of the change; what is not decomposed keeps all of it, and none at r = 0."""
    import torch

    if found is not None and min(before.shape) > r:
        left, values, right = found
        values[r:] = 0
        return before + left @ torch.diag(values) @ right
    return before if r == 0 else before + delta


def _each(work: Callable[[Any, Any], Any], left: Weights, right: Weights) -> Weights:
    return {name: work(part, right[name]) for name, part in left.items()}


def _subtract(left: Weights, right: Weights) -> Weights:
    return _each(lambda a, b: a - b, left, right)


def _dot(left: Weights, right: Weights) -> Any:
    return sum((part * right[name]).sum() for name, part in left.items())


if __name__ == "__main__":
    serve_job({"rank-curve": rank_curve, "landscape": landscape})
