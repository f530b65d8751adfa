"""`Watch`: one training run's model with its directions: it is read, and brought back."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch.distributed
from torch import Tensor

from lox_hf.records import TrainingReading
from lox_hf.training.correction import reapply
from lox_hf.training.monitor import DriftMonitor

if TYPE_CHECKING:
    from transformers import TrainerState

    from lox_hf.training.probe import SafetyProbe


class Watch:
    """What is read of one training run. All its processes have to make the same calls.

    Args:
        model: The model in training.
        monitor: Reads its drift.
        tokenizer: The model's tokenizer, for the probe.
        probe: Prompts that are asked; None asks none.

    Attributes:
        targets: Where `correct` brings the coordinates, by matrix name; nowhere at first.
    """

    def __init__(self, model: Any, monitor: DriftMonitor, tokenizer: Any, probe: "SafetyProbe | None") -> None:
        self.model, self.monitor, self.tokenizer, self.probe = model, monitor, tokenizer, probe
        self.targets: Mapping[str, Tensor] = {}

    def check(self) -> None:
        """Raise what a probe would meet at its first reading, before the first step."""
        if self.probe is not None:
            self.probe.check(self.model, self.tokenizer)

    def read(self, state: "TrainerState", moment: str) -> TrainingReading:
        """Read the model as it is now; nothing is changed.

        Args:
            state: The trainer's state, for step and epoch.
            moment: Why it is read.

        Returns:
            The reading, the same in all processes.

        Raises:
            NumericsError: If a matrix contains NaN or Inf; it is named.
        """
        drift = self.monitor.read()
        probe = self.probe.read(self.model, self.tokenizer) if self.probe else None
        return _of_process_zero(TrainingReading(state.global_step, float(state.epoch or 0), moment, drift, probe))

    def correct(self, reading: TrainingReading) -> TrainingReading:
        """Bring the coordinates to their targets, in place.

        Args:
            reading: The reading after which this is done.

        Returns:
            The reading with the size of the correction and the retention that is read with it.

        Raises:
            UnsupportedModelError: If a matrix cannot be changed so that a save keeps it.
            NumericsError: If a matrix contains NaN or Inf; it is named.
        """
        size = reapply(self.monitor.weights, self.monitor.subspace, self.targets)
        if not size:
            return reading
        return replace(reading, reapplied=size, retention_after=self.monitor.read().retention)


def _of_process_zero(reading: TrainingReading) -> TrainingReading:
    """What process zero has read: the answers to prompts may differ, and with them what is decided."""
    dist = torch.distributed
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return reading
    held = [reading]
    dist.broadcast_object_list(held, src=0)
    return held[0]
