"""`Watch`: one training run's model with its directions: it is read, and brought back."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lox_hf.errors import ConfigError
from lox_hf.records import TrainingReading
from lox_hf.training.correction import reapply
from lox_hf.training.monitor import DriftMonitor
from lox_hf.training.processes import from_process_zero

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

    def check(self, metric: str) -> None:
        """Raise what a probe would meet at its first reading, before the first step.

        Args:
            metric: The figure that is watched.

        Raises:
            ConfigError: If the probe's prompts do not measure it, or the probe cannot be used.
            PromptError: If its prompts cannot be had.
        """
        if self.probe is None:
            return
        asked = {prompt.harmful for prompt in self.probe.asked}
        needed = {"asr": True, "refusal_perplexity": True, "over_refusal": False}.get(metric)
        if needed is not None and needed not in asked:
            kind = "harmful" if needed else "harmless"
            raise ConfigError(f"'{metric}' is measured on {kind} prompts, and the probe has none: add some.")
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
        reading = TrainingReading(state.global_step, float(state.epoch or 0), moment, drift, probe)
        return from_process_zero(lambda: reading)  # answers to prompts may differ, and with them what is decided

    def correct(self, reading: TrainingReading) -> TrainingReading:
        """Bring the coordinates to their targets, in place.

        Args:
            reading: The reading after which this is done.

        Returns:
            The reading with the size of the correction and the retention that is read with it.

        Raises:
            UnsupportedModelError: If a matrix cannot be changed so that a save keeps it.
            LoxError: If there is an adapter "lox" that does not fit.
            NumericsError: If a matrix contains NaN or Inf; it is named.
        """
        size = reapply(self.monitor.weights, self.monitor.subspace, self.targets)
        if not size:
            return reading
        return replace(reading, reapplied=size, retention_after=self.monitor.retention())
