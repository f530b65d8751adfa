"""Our side of every comparison: lox_hf called the way a user calls it. Run as a child process by `harden.py`."""

from __future__ import annotations

import ctypes
import functools
import gc
import time
from pathlib import Path
from typing import Any

from measure import anonymous_bytes, serve_job

_DECOMPOSITIONS = ("svd", "svdvals", "eigh", "eigvalsh", "qr", "cholesky", "cholesky_ex")


def import_only() -> dict[str, Any]:
    """Import what hardening imports and end: the part of a process that is no work."""
    import lox_hf

    return {"function": lox_hf.harden_checkpoint.__name__}


def harden(aligned: str, base: str, output: str, r: int, alpha: float) -> dict[str, Any]:
    """Harden a checkpoint from disk to disk, alone or as one of the processes that torchrun has started."""
    from lox_hf import LoxConfig, harden_checkpoint, join_ranks

    config = LoxConfig(base_model_name_or_path=base, r=r, alpha=alpha)
    with join_ranks() as ranks:
        started, started_cpu = time.perf_counter(), time.process_time()
        report = harden_checkpoint(aligned, output, config, progressbar=False, ranks=ranks)
    cost = {"call_s": time.perf_counter() - started, "cpu_s": time.process_time() - started_cpu}
    return {**cost, "tensors": len(report.tensors), "max_steps": max(tensor.steps for tensor in report.tensors)}


def harden_again(first: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    """Harden a tiny pair, which pays for all that is loaded late, and then the pair that is measured."""
    harden(**arguments | first)
    return harden(**arguments)


def save_subspace(aligned: str, base: str, output: str, r: int) -> dict[str, Any]:
    """Decompose once and save the factors."""
    from lox_hf import LoxConfig, SafetySubspace

    SafetySubspace.from_models(aligned, base, LoxConfig(r=r), progressbar=False).save_pretrained(output)
    return {"saved_bytes": sum(file.stat().st_size for file in Path(output).iterdir())}


def apply_live(aligned: str, base: str | None, subspace: str | None, r: int, alpha: float) -> dict[str, Any]:
    """Harden a loaded model, from the base's folder or from a saved subspace, and say when and what it took."""
    counter = _count_decompositions()
    from lox_hf import LoxConfig, SafetySubspace, apply_lox, hardening_report

    model = _load_into_anonymous_memory(aligned)
    sizes = [parameter.numel() * parameter.element_size() for parameter in model.parameters()]
    config = LoxConfig(r=r, alpha=alpha)
    before_bytes, start_s, start_cpu_s = anonymous_bytes(), time.monotonic(), time.process_time()
    source = base if subspace is None else SafetySubspace.from_pretrained(subspace)
    apply_lox(model, config, base_model=source, progressbar=False)
    cpu_s, end_s = time.process_time() - start_cpu_s, time.monotonic()
    return {
        "cpu_s": cpu_s,
        "start_s": start_s,
        "end_s": end_s,
        "before_bytes": before_bytes,
        "model_bytes": sum(sizes),
        "largest_tensor_bytes": max(sizes),
        "decompositions": sum(counter.values()),
        "methods": sorted({tensor.method for tensor in hardening_report(model).tensors}),
    }


def _load_into_anonymous_memory(folder: str) -> Any:
    """Load a model and move its weights off the mapped file.

    Loaded weights may be private mappings of the checkpoint. Editing such a page in place turns it into anonymous
    memory, which would count as growth though the model merely replaced its own page. After the copy every weight is
    anonymous before the measurement begins, and freed heap is handed back so that it cannot hide growth either.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return model


def _count_decompositions() -> dict[str, int]:
    """Count calls of torch's decompositions from here on, in every thread."""
    import torch

    counter: dict[str, int] = {}

    def counted(name: str, function: Any) -> Any:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            counter[name] = counter.get(name, 0) + 1
            return function(*arguments, **options)

        return call

    for name in _DECOMPOSITIONS:
        setattr(torch.linalg, name, counted(name, getattr(torch.linalg, name)))
    return counter


if __name__ == "__main__":
    serve_job(
        {
            "imports": import_only,
            "harden": harden,
            "harden-again": harden_again,
            "subspace": save_subspace,
            "apply": apply_live,
        }
    )
