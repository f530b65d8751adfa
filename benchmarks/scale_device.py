"""`apply_lox` on a live model where it lies, beside full SVDs and plain copies there. Run as a child by `scale.py`."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accuracy import Differences
from checkpoints import SIZES, config_of, pieces, shapes
from measure import serve_job
from torch import Tensor

HOST = torch.device("cpu")
COPY_BYTES, QUICK_COPY_BYTES = 1 << 30, 1 << 26
COPIES = 10


def find(device: str) -> dict[str, Any]:
    """Say which device would be measured, and its name; nothing where there is none of the kind."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    place = accelerator if device == "auto" else torch.device(device)
    if place is None or place.type not in ("cpu", getattr(accelerator, "type", None)):
        return {}
    return {"device": str(place), "name": "cpu" if place.type == "cpu" else _name(place)}


@torch.no_grad()
def measure(device: str, quick: bool, repeats: int, r: int, alpha: float) -> dict[str, Any]:
    """Harden a model of random weights, with its base on the device and in host memory, beside SVDs and copies."""
    from lox_hf import LoxConfig, apply_lox

    place = torch.device(device)
    model, base = _pair("quick-small" if quick else "llama-2-7b", place)

    def harden(weights: dict[str, Tensor]) -> None:
        apply_lox(model, LoxConfig(r=r, alpha=alpha), base_model=weights, progressbar=False)

    on_host = {name: weight.cpu() for name, weight in base.items()}
    copy_bytes = QUICK_COPY_BYTES if quick else COPY_BYTES
    return {
        "parameters": sum(weight.numel() for weight in base.values()),
        "state_bytes": sum(weight.nbytes for weight in base.values()),
        "runs": {
            "device": [_cost(model, partial(harden, base), place) for _ in range(repeats + 1)],
            "host": [_cost(model, partial(harden, on_host), place) for _ in range(repeats + 1)],
        },
        "copy_bytes_per_s": {
            "device": _copy_rate(place, place, copy_bytes),
            "host": _copy_rate(HOST, place, copy_bytes),
        },
        **_dense_svds(model, base, partial(harden, base), r, alpha),
    }


def _pair(size_name: str, place: torch.device) -> tuple[Any, dict[str, Tensor]]:
    """Make a model on the device and the weights of its base: the spectrum of the pairs on disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = SIZES[size_name]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config_of(size))).bfloat16()
    model.to_empty(device=place)
    base = {}
    for name, weight in model.named_parameters():
        before, after = zip(*pieces(name, shapes(size)[name], "signal", 0, str(place)), strict=True)
        base[name] = torch.cat(before)
        weight.copy_(torch.cat(after))
    return model, base


def _by_shape(weights: dict[str, Tensor]) -> dict[tuple[int, ...], list[str]]:
    """Return the names of the matrices of each distinct shape."""
    names: dict[tuple[int, ...], list[str]] = {}
    for name, weight in weights.items():
        if weight.ndim > 1:
            names.setdefault(tuple(weight.shape), []).append(name)
    return names


def _dense_svds(
    model: Any, base: dict[str, Tensor], harden: Callable[[], object], r: int, alpha: float
) -> dict[str, Any]:
    """Time one full SVD of each distinct shape, and compare the entries that come of it with those of `harden`."""
    from lox_hf import revert_lox

    by_shape = _by_shape(base)
    harden()
    hardened = {names[0]: model.get_parameter(names[0]).clone() for names in by_shape.values()}
    revert_lox(model)
    differences, svds = Differences(), []
    torch.linalg.svd(torch.eye(64, device=model.device))  # loads the library
    for shape, names in by_shape.items():
        aligned = model.get_parameter(names[0]).detach()
        seconds, exact = _dense_svd(aligned, base[names[0]], r, alpha)
        svds.append({"shape": shape, "count": len(names), "seconds": seconds})
        differences.add(hardened[names[0]], exact, aligned)
    total_s = sum(row["count"] * row["seconds"] for row in svds)
    return {"svds": svds, "svd_s": total_s, "differences": differences.summary()}


def _dense_svd(aligned: Tensor, base: Tensor, r: int, alpha: float) -> tuple[float, Tensor]:
    """Return the seconds of a full SVD of the change in float32, and the hardened matrix that comes of it."""
    delta = aligned.float() - base.float()
    parts: list[Tensor] = []
    seconds = _seconds(lambda: parts.extend(torch.linalg.svd(delta, full_matrices=False)), delta.device)
    left, values, right = (part.double() for part in (parts[0][:, :r], parts[1][:r], parts[2][:r]))
    return seconds, (aligned.double() + alpha * (left * values) @ right).bfloat16()


def _copy_rate(source: torch.device, target: torch.device, size: int) -> float:
    """Return bytes a second that a copy moves: within a device each is read and written, from the host each crosses.

    The host's side is pinned where the target is an accelerator.
    """
    pinned = source.type == "cpu" and target.type != "cpu"
    one = torch.ones(size, dtype=torch.uint8, device=source, pin_memory=pinned)
    other = torch.empty_like(one, device=target)
    other.copy_(one)
    moved = 2 * size if source == target else size
    return moved / min(_seconds(lambda: other.copy_(one), target) for _ in range(COPIES))


def _seconds(work: Callable[[], object], place: torch.device) -> float:
    """Return the wall time until the device has done the work."""
    _wait(place)
    started = time.perf_counter()
    work()
    _wait(place)
    return time.perf_counter() - started


def _cost(model: Any, harden: Callable[[], object], place: torch.device) -> dict[str, Any]:
    """Harden once and take it back; return the wall time, and what more of an accelerator's memory was in use at once.

    The first run of all pays for libraries and buffers.
    """
    from lox_hf import revert_lox

    on_accelerator = place.type != "cpu"
    if on_accelerator:
        torch.accelerator.reset_peak_memory_stats(place)
        before = torch.accelerator.memory_allocated(place)
    seconds = _seconds(harden, place)
    peak = torch.accelerator.max_memory_allocated(place) - before if on_accelerator else None
    revert_lox(model)
    return {"seconds": seconds, "peak_beyond_bytes": peak}


def _wait(place: torch.device) -> None:
    if place.type != "cpu":
        torch.accelerator.synchronize(place)


def _name(place: torch.device) -> str:
    module = torch.get_device_module(place)
    return module.get_device_name(place) if hasattr(module, "get_device_name") else place.type  # MPS has no names


if __name__ == "__main__":
    serve_job({"find": find, "measure": measure})
