"""The demonstration's pair, hardly trained, and its weights."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from lox_hf.core.delta import Delta
from lox_hf.core.lowrank import decompose
from lox_hf.demo import Recipe

TINY = Recipe(base_steps=3, base_warmup=1, alignment_steps=2, batch_size=4)


def top_directions(aligned: torch.Tensor, base: torch.Tensor, k: int) -> torch.Tensor:
    """Proj_k(aligned - base) by a full SVD."""
    return decompose(Delta(aligned, base), k, svd="exact").factors.dense()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight for shard in folder.glob("*.safetensors") for name, weight in load_file(shard).items()}
