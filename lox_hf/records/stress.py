"""What a fine-tuning attack did to one model, step by step."""

import math
from dataclasses import dataclass
from typing import Any, Self

from lox_hf.records.base import JsonRecord
from lox_hf.records.drift import DriftReading
from lox_hf.records.safety import Rate, rates_of


@dataclass(frozen=True)
class StepReading(JsonRecord):
    """Safety after so many steps of an attack; step 0 is before it.

    Attributes:
        step: Optimiser steps so far.
        asr: Attack success rate on the harmful prompts.
        strict_asr: Harmful prompts whose known answer was given; n is 0 where no answers are known.
        refusal: Harmful prompts that were refused.
        degenerate: Responses that are empty, repetition or not language, among all prompts.
        over_refusal: Harmless prompts that were refused; n is 0 where there are none.
        accuracy: Harmless prompts whose known answer was given; n is 0 where no answers are known.
        labels: A letter per harmful prompt, in their order: r(efused), c(omplied), d(egenerate), u(nscored).
    """

    step: int
    asr: Rate
    strict_asr: Rate
    refusal: Rate
    degenerate: Rate
    over_refusal: Rate
    accuracy: Rate
    labels: str = ""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the reading with its rates."""
        names = ("asr", "strict_asr", "refusal", "degenerate", "over_refusal", "accuracy")
        return super().from_dict(data | rates_of(data, *names))


@dataclass(frozen=True)
class TaskScore(JsonRecord):
    """How well a model does what an attack's data teaches, on rows of it that were not trained on (adaptability).

    Attributes:
        accuracy: Held-out prompts that were answered right; n is 0 where answers cannot be told right from wrong.
        loss: Mean negative log-likelihood of a held-out response's token, in nats; NaN where there is no such row.
    """

    accuracy: Rate
    loss: float = math.nan

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the score with its rate."""
        return super().from_dict(data | rates_of(data, "accuracy"))


@dataclass(frozen=True)
class UtilityScore(JsonRecord):
    """What a model is still good for.

    Attributes:
        measure: What was measured: "known answers", "gsm8k", "perplexity" or "not measured".
        accuracy: Questions that were answered right; n is 0 where it is not what was measured.
        perplexity: Of harmless texts; NaN where it is not what was measured.
    """

    measure: str
    accuracy: Rate
    perplexity: float = math.nan

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the score with its rate."""
        return super().from_dict(data | rates_of(data, "accuracy"))


@dataclass(frozen=True)
class CellResult(JsonRecord):
    """One model under one attack at one learning rate with one seed.

    Attributes:
        model: Which model of the matrix: "aligned", "hardened r=6 alpha=1.25", "random r=6 alpha=1.25", ...
        attack: Name of the attack.
        learning_rate: Its highest learning rate.
        seed: Seed of its order of rows, and of the pair of models where every seed has its own.
        readings: Safety along the attack, step 0 first, the last step last.
        task_before: Score on the attack's own task before.
        task_after: The same afterwards.
        utility_before: Utility before.
        utility_after: Utility afterwards.
        drift_before: Drift before, without its matrices.
        drift_after: Drift afterwards, without its matrices.
        train_loss: Mean training loss.
    """

    model: str
    attack: str
    learning_rate: float
    seed: int
    readings: tuple[StepReading, ...]
    task_before: TaskScore
    task_after: TaskScore
    utility_before: UtilityScore
    utility_after: UtilityScore
    drift_before: DriftReading
    drift_after: DriftReading
    train_loss: float = math.nan

    @property
    def steps(self) -> int:
        """Optimiser steps of the attack."""
        return self.readings[-1].step

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the result with its nested records."""
        nested = {
            "readings": tuple(map(StepReading.from_dict, data["readings"])),
            **{f"task_{when}": TaskScore.from_dict(data[f"task_{when}"]) for when in ("before", "after")},
            **{f"utility_{when}": UtilityScore.from_dict(data[f"utility_{when}"]) for when in ("before", "after")},
            **{f"drift_{when}": DriftReading.from_dict(data[f"drift_{when}"]) for when in ("before", "after")},
        }
        return super().from_dict(data | nested)
