"""Corrections of a model under LoRA: a second adapter named "lox", active and saved with the first, and never trained.

PEFT turns requires_grad on for every active adapter: at `set_adapter`, and after each pass of DPO's reference. A
correction that is a parameter would then count in the norm that gradients are clipped to, and checkpointed activations
would be computed anew with another graph. So its factors are buffers: state dicts, `save_pretrained`, `load_adapter`
and merging treat them as they treat parameters, and nothing can train them.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lox_hf.adapter import scaling_one
from lox_hf.errors import LoxError, UnsupportedModelError, listing

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

CORRECTION = "lox"
"""Name of the adapter, and of its folder in a checkpoint."""

Factors = dict[str, tuple[Tensor, Tensor]]
"""left (m, k) and right (k, n) by module name, in the orientation of the stored weight."""


class FixedFactor(nn.Module):
    """A linear map without bias whose weight is a buffer.

    Args:
        weight: (out, in); copied, in float32.
        device: Where the copy goes.
    """

    weight: Tensor
    bias = None

    def __init__(self, weight: Tensor, device: torch.device) -> None:
        super().__init__()
        copy = torch.empty(weight.shape, dtype=torch.float32, device=device).copy_(weight.detach())
        self.register_buffer("weight", copy)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map."""
        return linear(x, self.weight)


@torch.no_grad()
def add_correction(model: "PeftModel", changes: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Add left @ right to what modules compute with, in the adapter "lox", which is made when it is first needed.

    Args:
        model: The PeftModel.
        changes: left (m, k) and right (k, n) by the module's name in the base model; `right` is the same at every
            call, so that the adapter keeps its rank.

    Raises:
        UnsupportedModelError: If a module can carry no LoRA, or TRL's DPO switches between adapters by name.
        LoxError: If there is an adapter "lox" that is trained, or that holds other directions.
    """
    if not changes:
        return
    held = _held(model)
    check_correction(model, held, changes)
    fresh = {name: (torch.zeros_like(left), right) for name, (left, right) in changes.items() if name not in held}
    if fresh:
        held |= _install(model, held | fresh)
    for name, (left, _) in changes.items():
        held[name][0].add_(left.to(held[name][0]))


def activate_correction(model: nn.Module) -> None:
    """Make the adapter "lox" active again and fixed, after a Trainer has loaded it from a checkpoint.

    A Trainer that resumes loads all adapters and activates the first alone. Without an adapter "lox", and for a model
    that is no PeftModel, this does nothing.

    Args:
        model: The model that callbacks receive.

    Raises:
        LoxError: If the adapter "lox" is the one that is trained.

    Example:
        >>> activate_correction(model)  # doctest: +SKIP
    """
    if CORRECTION not in getattr(model, "peft_config", {}):
        return
    peft_model: Any = model
    _check_not_trained(peft_model)
    for layer in _layers(peft_model).values():
        for factors in (layer.lora_A, layer.lora_B):
            if not isinstance(factors[CORRECTION], FixedFactor):
                weight = factors[CORRECTION].weight
                factors[CORRECTION] = FixedFactor(weight, weight.device)
    others = [name for name in peft_model.active_adapters if name != CORRECTION]
    with _same_trainable(peft_model):
        peft_model.base_model.set_adapter([*others, CORRECTION])


def _held(model: "PeftModel") -> Factors:
    """Views of the factors that the adapter holds now."""
    return {name: _oriented(layer) for name, layer in _layers(model).items()}


def _layers(model: "PeftModel") -> dict[str, Any]:
    """PEFT's layers that have the adapter."""
    modules = model.get_base_model().named_modules()
    return {name: module for name, module in modules if CORRECTION in getattr(module, "lora_A", {})}


def _oriented(layer: Any) -> tuple[Tensor, Tensor]:
    """The factors of the stored weight, which Conv1D has the other way round."""
    b, a = layer.lora_B[CORRECTION].weight, layer.lora_A[CORRECTION].weight
    return (a.T, b.T) if layer.fan_in_fan_out else (b, a)


def _install(model: "PeftModel", factors: Factors) -> Factors:
    """Make the adapter anew on all of these modules; it is active when this returns."""
    from peft import PeftModel

    with _same_trainable(model):
        if CORRECTION in model.peft_config:
            model.delete_adapter(CORRECTION)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(tie_word_embeddings|fan_in_fan_out).*")
            # Made on the meta device, it draws no random numbers. The class's own method: those for classification
            # would give the adapter its own copy of the head.
            PeftModel.add_adapter(model, CORRECTION, _config(model, factors), low_cpu_mem_usage=True)
    for name, layer in _layers(model).items():
        left, right = factors[name]
        b, a = (right.T, left.T) if layer.fan_in_fan_out else (left, right)
        device = layer.get_base_layer().weight.device
        layer.lora_A[CORRECTION], layer.lora_B[CORRECTION] = FixedFactor(a, device), FixedFactor(b, device)
    activate_correction(model)
    return _held(model)


def _config(model: "PeftModel", factors: Factors) -> "LoraConfig":
    from peft import LoraConfig

    first = model.peft_config[model.active_adapters[0]]
    return LoraConfig(
        **scaling_one({name: len(right) for name, (_, right) in factors.items()}),
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
    )


@contextmanager
def _same_trainable(model: nn.Module) -> Iterator[None]:
    """Keep requires_grad of every parameter; PEFT turns it on and off as it makes and activates adapters."""
    before = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    yield
    for parameter in model.parameters():
        parameter.requires_grad_(before.get(id(parameter), False))


def check_correction(model: "PeftModel", held: Factors, changes: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Raise what keeps `add_correction` from adding these, before anything is changed.

    Args:
        model: The PeftModel.
        held: What the adapter holds now, by module name.
        changes: What is to be added.

    Raises:
        UnsupportedModelError: If a module can carry no LoRA, or TRL's DPO switches between adapters by name.
        LoxError: If the adapter "lox" is trained, or holds other directions.
    """
    from transformers.pytorch_utils import Conv1D

    _check_not_trained(model)
    if "ref" in model.peft_config:
        raise UnsupportedModelError(
            "TRL's DPO has put an adapter 'ref' beside the one that is trained and switches between the two by name, "
            "which drops the correction. Pass the model without adapters and peft_config= to DPOTrainer; an adapter "
            "that is trained already goes into the base first, with merge_and_unload()."
        )
    modules: dict[str, Any] = {name: model.get_base_model().get_submodule(name) for name in changes}
    inner = {
        name: module.get_base_layer() if hasattr(module, "lora_A") else module for name, module in modules.items()
    }
    wrong = [name for name, module in inner.items() if not isinstance(module, nn.Linear | Conv1D)]
    if wrong:
        raise UnsupportedModelError(
            f"{len(wrong)} modules can take no correction as they are no linear layers: {listing(wrong, 8)} Leave "
            "them out of the subspace with exclude_modules, or train them as a whole with modules_to_save."
        )
    other = [
        name
        for name, (_, right) in changes.items()
        if name in held and not torch.equal(held[name][1], right.to(held[name][1]))
    ]
    if other:
        raise LoxError(
            f"The adapter '{CORRECTION}' of this model holds other directions than the subspace in {len(other)} "
            f"modules: {listing(other, 5)} Use the subspace that the run began with; if the adapter is your "
            "own, load it under another name."
        )


def _check_not_trained(model: "PeftModel") -> None:
    factors = [part for layer in _layers(model).values() for part in (layer.lora_A, layer.lora_B)]
    if any(p.requires_grad for part in factors for p in part[CORRECTION].parameters()):
        raise LoxError(
            f"The adapter '{CORRECTION}' is being trained, but this name is kept for corrections: give it another one."
        )
