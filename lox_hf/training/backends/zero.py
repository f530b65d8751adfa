"""A matrix under DeepSpeed ZeRO: in low precision for the forward pass, in float32 for the optimiser."""

from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from lox_hf.core.geometry import coordinates
from lox_hf.core.lowrank import LowRank
from lox_hf.training.backends.matrix import add_product


def is_zero(tensor: Tensor) -> bool:
    """Whether DeepSpeed holds this: a parameter of stage 3, or one that stage 1 or 2 trains."""
    return hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping")


class ZeroMatrix:
    """A matrix under ZeRO stage 1, 2 or 3; it is gathered where it is partitioned.

    Args:
        weight: W, (m, n): the parameter, which in stage 3 is empty between uses.
    """

    collective = True

    def __init__(self, weight: Tensor) -> None:
        self.weight = cast("Any", weight)  # DeepSpeed's attributes are in no type
        self.partitioned = hasattr(weight, "ds_id")
        shape = self.weight.ds_shape if self.partitioned else weight.shape
        self.shape = (shape[0], shape[1])
        self.dtype = weight.dtype

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return a copy of W as the forward pass uses it."""
        with self._gathered():
            return self.weight.detach().clone()

    @torch.no_grad()
    def coordinates(self, directions: LowRank) -> Tensor:
        """Return U_k^T W V_k of W as the forward pass uses it."""
        with self._gathered():
            return coordinates(self.weight.detach(), directions)

    @torch.no_grad()
    def add(self, left: Tensor, right: Tensor) -> None:
        """Add left @ right to the optimiser's float32 copy and to what the forward pass uses.

        Without the first the next step undoes it; without the second a save or a reading before that step misses it. A
        frozen matrix, and any before DeepSpeed's engine exists, has no float32 copy.
        """
        master = self._master()
        if master is not None:
            add_product(master, left, right)
            self._set_master(master)
        with self._gathered(changed=True):
            if master is None:
                add_product(self.weight.data, left, right)
            else:
                self.weight.data.copy_(master)  # rounded once, as the optimiser's own step does

    def _gathered(self, *, changed: bool = False) -> AbstractContextManager[None]:
        """The whole parameter is there inside; stages 1 and 2 have it anyway."""
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters([self.weight], modifier_rank=0 if changed else None)

    def _master(self) -> Tensor | None:
        """The whole of the optimiser's copy, if there is one."""
        from deepspeed.utils import safe_get_full_fp32_param

        if self.partitioned and not hasattr(self.weight, "_z3_optimizer"):
            return None
        return safe_get_full_fp32_param(self.weight)

    def _set_master(self, value: Tensor) -> None:
        """Write the whole of the optimiser's copy: each process the part it holds."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if not self.partitioned:
            safe_set_full_fp32_param(self.weight, value)
            return
        # DeepSpeed's own setter for the whole fails where the parts do not divide it evenly: the last one is padded.
        size, rank = self.weight.partition_numel(), dist.get_rank(self.weight.ds_process_group)
        flat = value.flatten()[rank * size : (rank + 1) * size]
        safe_set_local_fp32_param(self.weight, pad(flat, (0, size - flat.numel())))
