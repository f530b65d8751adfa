"""Our side of `analysis.py`: rank curve and landscape as a user calls them, with a score that costs nothing.

Run as a child process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from jobs import _load_into_anonymous_memory
from measure import anonymous_bytes, serve_job


def load_only(aligned: str, r: int) -> dict[str, Any]:
    """Import and load what the others do, and end: the part of a process that is no work."""
    import lox_hf.analysis.landscape  # noqa: F401
    import lox_hf.analysis.rank_curve  # noqa: F401

    model = _load_into_anonymous_memory(aligned)
    sizes = [parameter.numel() * parameter.element_size() for parameter in model.parameters()]
    shapes = [tuple(parameter.shape) for parameter in model.parameters() if parameter.dim() == 2]
    factors = sum(4 * min(r, rows, columns) * (rows + columns + 1) for rows, columns in shapes)
    coordinates = sum(8 * min(r, rows, columns) ** 2 for rows, columns in shapes)
    return {"model_bytes": sum(sizes), "factor_bytes": factors + coordinates}


def rank_curve(aligned: str, base: str, ranks: list[int]) -> dict[str, Any]:
    """Decompose, and form the base with every number of directions; the model is put back at the end."""
    from lox_hf.analysis.rank_curve import rank_curve

    model = _load_into_anonymous_memory(aligned)

    def call() -> dict[str, Any]:
        options = {"ranks": ranks, "aligned_model": aligned, "measure": "value", "progressbar": False}
        return {"points": len(rank_curve(model, base, _constant, **options).points)}

    return _measured(call)


def landscape(models: list[str], grid: list[int]) -> dict[str, Any]:
    """Find the plane, and form the models and every point of the grid; the model is put back at the end."""
    from lox_hf.analysis.landscape import landscape

    model = _load_into_anonymous_memory(models[0])

    def call() -> dict[str, Any]:
        found = landscape(model, models, _constant, grid=(grid[0], grid[1]), measure="value", progressbar=False)
        places = [(model.x, model.y) for model in found.models]
        return {"points": len(found.points), "places": places, "xs": found.xs, "ys": found.ys}

    return _measured(call)


def _measured(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run the work with a clock before and after it; imports and the loaded model are there already."""
    before_bytes, start_s, start_cpu_s = anonymous_bytes(), time.monotonic(), time.process_time()
    found = call()
    cpu_s, end_s = time.process_time() - start_cpu_s, time.monotonic()
    return {**found, "cpu_s": cpu_s, "start_s": start_s, "end_s": end_s, "before_bytes": before_bytes}


def _constant(model: Any) -> float:
    return 0.0


if __name__ == "__main__":
    serve_job({"load": load_only, "rank-curve": rank_curve, "landscape": landscape})
