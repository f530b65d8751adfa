"""The other side of every comparison: the reference's algorithm, its SVDs alone, and a plain copy.

Written from the description of what the reference script does (both models loaded, every delta held, one full SVD a
matrix in float32, the projection rebuilt as a dense product, the state dict loaded back and saved); none of its code.
Run as a child process by `harden.py`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from measure import serve_job

# As fast as copying inside the kernel: the block stays in the cache of the core. Blocks of 8 MiB take twice as long.
_CHUNK_BYTES = 1 << 18


def harden_as_reference(aligned: str, base: str, output: str, r: int, alpha: float) -> dict[str, Any]:
    """Harden a checkpoint the way the reference does, whole models in memory."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.bfloat16)
    other = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    after, before = model.state_dict(), other.state_dict()
    deltas = {name: after[name] - before[name] for name in after}
    hardened = {}
    for name, delta in deltas.items():
        edited = delta.ndim > 1
        hardened[name] = after[name] + alpha * _project(delta.float(), r) if edited else after[name]
    model.load_state_dict(hardened)
    model.save_pretrained(output)
    return {}


def time_dense_svds(aligned: str, base: str, r: int, alpha: float) -> dict[str, Any]:
    """Time one full SVD, rebuild and addition for every distinct shape, and count how often each shape occurs."""
    from pairs import TensorPairs

    with TensorPairs(aligned, base) as pairs:
        names: dict[tuple[int, ...], list[str]] = {}
        for name, shape in pairs.matrices().items():
            names.setdefault(shape, []).append(name)
        rows = []
        for shape, members in names.items():
            after, before = pairs.read(members[0])
            start = time.process_time()
            hardened = after + alpha * _project((after - before).float(), r)
            hardened.bfloat16()
            rows.append({"shape": shape, "count": len(members), "cpu_s": time.process_time() - start})
    return {"shapes": rows, "total_cpu_s": sum(row["count"] * row["cpu_s"] for row in rows)}


def copy_and_read(aligned: str, base: str, output: str, sync: bool) -> dict[str, Any]:
    """Copy the aligned folder and read the base once; `sync` makes the copy as durable as a published checkpoint."""
    started = time.perf_counter()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    target = Path(output)
    target.mkdir()
    for file in sorted(Path(aligned).iterdir()):
        with file.open("rb", buffering=0) as source, (target / file.name).open("wb", buffering=0) as sink:
            while count := source.readinto(buffer):
                sink.write(buffer[:count])
            if sync:
                os.fsync(sink.fileno())
    if sync:
        _sync_folder(target)
        _sync_folder(target.parent)
    for file in sorted(Path(base).iterdir()):
        with file.open("rb", buffering=0) as source:
            while source.readinto(buffer):
                pass
    return {"call_s": time.perf_counter() - started}


def _project(delta: Any, r: int) -> Any:
    """Return the best rank-r part of a float32 matrix from its full SVD, as a dense product of full factors."""
    import torch

    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    values[r:] = 0
    return left @ torch.diag(values) @ right


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    serve_job({"harden": harden_as_reference, "svds": time_dense_svds, "copy": copy_and_read})
