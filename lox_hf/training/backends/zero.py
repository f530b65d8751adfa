"""A matrix under DeepSpeed ZeRO 1 or 2: whole in every process, while the optimiser's float32 copy is in pieces."""

from typing import Any, cast

import torch
from torch import Tensor

from lox_hf.core.combine import add_product
from lox_hf.training.backends.matrix import PlainMatrix


class SteppedMatrix(PlainMatrix):
    """A matrix that is here as a whole, and that the next step of ZeRO 1 or 2 takes from the optimiser's copy.

    Args:
        weight: W, (m, n): the parameter.
    """

    collective = True

    @torch.no_grad()
    def add(self, left: Tensor, right: Tensor) -> None:
        """Add left @ right to the optimiser's float32 copy and to what the forward pass uses.

        Without the first the next step undoes it; without the second a save or a reading before that step misses it.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        weight = cast("Any", self.weight)  # DeepSpeed's attributes are in no type
        master = cast("Tensor", safe_get_full_fp32_param(weight))
        add_product(master, left, right)
        safe_set_full_fp32_param(weight, master)
        weight.data.copy_(master)  # rounded once, as the optimiser's own step does
