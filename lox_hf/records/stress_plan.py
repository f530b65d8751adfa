"""What a stress test would do, before it does it."""

import math
from dataclasses import dataclass
from typing import Any, Self

from lox_hf.records.base import JsonRecord


@dataclass(frozen=True)
class AttackPlan(JsonRecord):
    """One attack of a stress test.

    Attributes:
        name: Its name.
        rows: Rows that are trained on.
        held_out: Rows that score its own task.
        steps: Optimiser steps.
        readings: Steps after which safety is read.
        learning_rates: What every model meets.
        source: Where its settings come from.
    """

    name: str
    rows: int
    held_out: int
    steps: int
    readings: tuple[int, ...]
    learning_rates: tuple[float, ...]
    source: str = ""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the plan; lists become tuples again."""
        return super().from_dict({**data, **{name: tuple(data[name]) for name in ("readings", "learning_rates")}})


@dataclass(frozen=True)
class StressPlan(JsonRecord):
    """What a stress test would do; every check that needs no training has passed.

    Attributes:
        models: Names of the models, in the order of the report.
        attacks: The attacks.
        seeds: The seeds.
        scanning_seeds: Those that meet all learning rates.
        harmful: Harmful prompts.
        harmless: Harmless prompts; 0 leaves over-refusal unmeasured.
        cells: Runs in all: models x attacks x learning rates x seeds.
        seconds: Time for all of them, in seconds, from a few real steps and answers, without the measurement of
            utility and of the attacks' own tasks; NaN where no steps were taken.
        memory_bytes: Weights, gradients and AdamW's two moments of one attack, without activations.
        not_run: What belongs to a full test and is not run, each with its reason.

    Example:
        >>> from lox_hf import plan_stress
        >>> plan_stress(StressConfig("org/aligned", "org/base", ["gsm8k"])).cells  # doctest: +SKIP
        27
    """

    models: tuple[str, ...]
    attacks: tuple[AttackPlan, ...]
    seeds: tuple[int, ...]
    scanning_seeds: tuple[int, ...]
    harmful: int
    harmless: int
    cells: int
    seconds: float = math.nan
    memory_bytes: int = 0
    not_run: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the plan with its nested records."""
        lists = {name: tuple(data[name]) for name in ("models", "seeds", "scanning_seeds", "not_run") if name in data}
        return super().from_dict({**data, **lists, "attacks": tuple(map(AttackPlan.from_dict, data["attacks"]))})
