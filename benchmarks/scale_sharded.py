"""`apply_lox` on a model that lies in pieces on several processes, and on the same model in one.

Run as child processes by `scale.py`, the first two by torchrun.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import anonymous_bytes, serve_job
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lox_hf import LoxConfig, apply_lox


@torch.no_grad()
def fsdp2(aligned: str, output: str, **settings: Any) -> dict[str, Any]:
    """Be one of the processes that hold a model under FSDP2."""
    from transformers.distributed import DistributedConfig

    dist.init_process_group("gloo")
    sharding = DistributedConfig(fsdp_size=dist.get_world_size())
    model = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.bfloat16, distributed_config=sharding)
    parameters = dict(model.named_parameters())
    found = _harden(model, [weight.to_local() for weight in parameters.values()], settings)
    _save(parameters, lambda weight: weight.full_tensor(), output)
    return _of_all(found)


@torch.no_grad()
def zero3(aligned: str, output: str, **settings: Any) -> dict[str, Any]:
    """Be one of the processes that hold a model under DeepSpeed ZeRO-3, as it is before the engine exists."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.init_distributed("gloo")
    stage = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    partition = HfDeepSpeedConfig(stage)  # while it lives, weights are partitioned as they are loaded
    model = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.bfloat16)
    del partition
    parameters = dict(model.named_parameters())
    found = _harden(model, [weight.ds_tensor for weight in parameters.values()], settings)

    def whole(weight: Any) -> Tensor:
        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()

    _save(parameters, whole, output)
    return _of_all(found)


@torch.no_grad()
def alone(aligned: str, output: str, **settings: Any) -> dict[str, Any]:
    """Hold the whole model in one process."""
    model = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.bfloat16)
    found = _harden(model, list(model.parameters()), settings)
    model.save_pretrained(output)
    return found


def _harden(model: Any, pieces: list[Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    """Harden, and say when, how long it took, and what this process held just before.

    Every page of the pieces is written once before: pages that still map the checkpoint would become anonymous memory
    by the edit alone, and count as growth.
    """
    for piece in pieces:
        piece.mul_(1)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before_bytes = anonymous_bytes()
    if dist.is_initialized():
        dist.barrier()
    start_s = time.monotonic()
    config = LoxConfig(r=settings["r"], alpha=settings["alpha"])
    apply_lox(model, config, base_model=settings["base"], progressbar=False)
    return {
        "pid": os.getpid(),
        "before_bytes": before_bytes,
        "share_bytes": sum(piece.nbytes for piece in pieces),
        "start_s": start_s,
        "end_s": time.monotonic(),
    }


def _save(parameters: dict[str, Any], whole: Callable[[Any], Tensor], output: str) -> None:
    """Bring the pieces together, tensor by tensor; the first process writes them."""
    found = {}
    for name, weight in parameters.items():
        tensor = whole(weight)
        if dist.get_rank() == 0:
            found[name] = tensor
    if dist.get_rank() == 0:
        Path(output).mkdir()
        save_file(found, Path(output) / "model.safetensors", metadata={"format": "pt"})


def _of_all(found: dict[str, Any]) -> dict[str, Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    dist.barrier()
    dist.destroy_process_group()
    return {"processes": everyone}


if __name__ == "__main__":
    serve_job({"fsdp2": fsdp2, "zero3": zero3, "alone": alone})
