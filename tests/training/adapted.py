"""Models under LoRA, directions and changes of their matrices, and what they answer."""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import zoo
from lox_hf.core.lowrank import LowRank
from lox_hf.training.backends import LiveWeights, open_weights

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
TARGETS = {
    "llama": ["q_proj", "down_proj", "embed_tokens", "lm_head"],
    "gpt2": ["c_attn", "wte"],  # Conv1D is stored the other way round
    "mixtral": ["q_proj"],  # beside fused experts
}
PROMPT = torch.arange(8)[None]


def wrapped(kind: str = "llama", **changes: Any) -> PeftModel:
    """A model of the zoo under adapters with random weights, seeded."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        config = LoraConfig(**{**LORA, "target_modules": TARGETS.get(kind), **changes})
        return get_peft_model(zoo.make_model(kind), config)


def axes(shape: tuple[int, int], k: int = 3, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(side, k, generator=generator))[0] for side in shape)
    return LowRank(u, torch.ones(k), v.T)


def all_axes(weights: LiveWeights) -> dict[str, LowRank]:
    return {name: axes(matrix.shape, seed=crc32(name.encode())) for name, matrix in weights.matrices.items()}


def read(model: nn.Module, directions: Mapping[str, LowRank] | None = None) -> dict[str, Tensor]:
    weights = open_weights(model)
    directions = directions or all_axes(weights)
    return {name: weights.matrices[name].coordinates(along) for name, along in directions.items()}


def merged(model: PeftModel) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return copy.deepcopy(model).merge_and_unload()


def differ(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def changes_of(weights: LiveWeights, part: str, size: float = 0.05) -> dict[str, tuple[Tensor, Tensor]]:
    """A change of every matrix whose name holds `part`."""
    found = {name: along for name, along in all_axes(weights).items() if part in name}
    return {name: (size * along.U, along.Vh) for name, along in found.items()}


def load_both(model: Any, folder: Path) -> PeftModel:
    """Load a checkpoint with nothing but PEFT."""
    loaded = PeftModel.from_pretrained(model, str(folder))
    loaded.load_adapter(str(folder / "lox"), adapter_name="lox")
    loaded.base_model.set_adapter(["default", "lox"])
    return loaded


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(PROMPT).logits
