"""A frozen bitsandbytes weight under LoRA: dequantised one module at a time, and only when it is read."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lox_hf.core.geometry import coordinates
from lox_hf.core.lowrank import LowRank
from lox_hf.errors import UnsupportedModelError
from lox_hf.weights.selection import module_name

CODES = ("Params4bit", "Int8Params")
"""How bitsandbytes holds weights of 4 and of 8 bits."""
QUANTISED_LAYERS = ("Linear4bit", "Linear8bitLt")


class QuantisedMatrix:
    """A matrix in codes, read as the numbers that they stand for; it cannot be changed.

    Args:
        module: The quantised linear layer.
        name: Its name, for messages.
    """

    collective = False
    dtype = torch.float32

    def __init__(self, module: Any, name: str) -> None:
        self.module, self.name = module, name
        self.shape = (int(self.module.out_features), int(self.module.in_features))

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return W in float32.

        Raises:
            UnsupportedModelError: If bitsandbytes has rearranged the codes for forward passes on the CPU.
        """
        from peft.utils.integrations import dequantize_module_weight

        if getattr(getattr(self.module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise UnsupportedModelError(
                f"{self.name}: bitsandbytes has rearranged this 4-bit weight for the CPU at a forward pass without "
                "gradients in eval mode, and cannot dequantise it any more. Read it before the first evaluation, "
                "which LoxCallback does when training begins, or train on a GPU."
            )
        return dequantize_module_weight(self.module).float()

    def coordinates(self, directions: LowRank) -> Tensor:
        """Return U_k^T W V_k."""
        return coordinates(self.dense(), directions)

    def add(self, left: Tensor, right: Tensor) -> None:
        """Refuse: a correction goes into an adapter.

        Raises:
            UnsupportedModelError: Always.
        """
        raise UnsupportedModelError(f"{self.name} is quantised, so it cannot be changed in place.")


def quantised_matrices(base: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, QuantisedMatrix]:
    """Find the weights that bitsandbytes holds in codes.

    Args:
        base: The base model under adapters.
        parameters: Its parameters, by the names it has without adapters.

    Returns:
        Matrices by those names; none where the model is not quantised.

    Raises:
        UnsupportedModelError: If it is quantised by something else, or codes are sharded over processes.
    """
    layers = {id(m.weight): m for m in base.modules() if type(m).__name__ in QUANTISED_LAYERS}
    found = {
        name: QuantisedMatrix(layers[id(tensor)], module_name(name))
        for name, tensor in parameters.items()
        if id(tensor) in layers and type(tensor).__name__ in CODES
    }
    scheme = getattr(getattr(base, "config", None), "quantization_config", None)
    if len(found) < len(layers) or (scheme is not None and not found):
        held = "sharded over processes" if layers else f"quantised by {type(scheme).__name__}"
        raise UnsupportedModelError(
            f"{type(base).__name__} is {held}: of quantised models only those of bitsandbytes can be read in "
            "training, 4-bit or 8-bit, whole on every process. Read merged checkpoints with read_drift instead."
        )
    return found
