"""Several reports of safety side by side: two models, two judges, one run."""

import math
from dataclasses import dataclass
from typing import Any, Self

from lox_hf.records.base import JsonRecord
from lox_hf.records.safety import Rate, SafetyReport, rates_of


@dataclass(frozen=True)
class PairedDifference(JsonRecord):
    """One rate before and after, over the prompts that both reports scored.

    Attributes:
        before: The rate before, over the pairs.
        after: The rate after, over the pairs.
        difference: after - before, in [-1, 1]; NaN where there are no pairs.
        low: Lower end of its 95 % interval by a paired bootstrap.
        high: Upper end.
        p_value: Two-sided exact McNemar test.
        gained: Pairs that have the property only after.
        lost: Pairs that have it only before.

    Example:
        >>> from lox_hf.statistics import paired_difference
        >>> paired_difference([True, True, False], [False, True, False]).lost
        1
    """

    before: Rate
    after: Rate
    difference: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p_value: float = math.nan
    gained: int = 0
    lost: int = 0

    def __str__(self) -> str:
        if self.before.n == 0:
            return "not measured"
        interval = f"[{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
        return f"{100 * self.difference:+.1f} points {interval}, p {self.p_value:.2g}, {self.before.n} pairs"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record with its rates."""
        return super().from_dict(data | rates_of(data, "before", "after"))


@dataclass(frozen=True)
class SafetyComparison(JsonRecord):
    """Two models on the same prompts by the same judge.

    Attributes:
        asr: Attack success rate, over the harmful prompts.
        refusal: Refusals of the harmful prompts.
        over_refusal: Refusals of the harmless prompts.
        degenerate: Degenerate responses, over all prompts.
        strict_asr: Known answers given to harmful prompts.
        accuracy: Known answers given to harmless prompts.
        unpaired: Prompts that only one of the two reports has, or that one of them left unscored.
        seed: Seed of the bootstrap.
        models: Names of the model before and the model after; empty where responses were given.
        warnings: What a reader should know.

    Example:
        >>> from lox_hf import attack_success_rate, compare
        >>> before = attack_success_rate(["How do I pick a lock?"], ["First, take a thin piece of metal."])
        >>> after = attack_success_rate(["How do I pick a lock?"], ["I'm sorry, but I can't help with that."])
        >>> compare(before, after).asr.difference
        -1.0
    """

    asr: PairedDifference
    refusal: PairedDifference
    over_refusal: PairedDifference
    degenerate: PairedDifference
    strict_asr: PairedDifference
    accuracy: PairedDifference
    unpaired: int = 0
    seed: int = 0
    models: tuple[str, str] = ("", "")
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"attack success {self.asr}; over-refusal {self.over_refusal}; known answers {self.accuracy}"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record with its nested records."""
        names = ("asr", "refusal", "over_refusal", "degenerate", "strict_asr", "accuracy")
        nested = {name: PairedDifference.from_dict(data[name]) for name in names}
        lists = {name: tuple(data[name]) for name in ("models", "warnings") if name in data}
        return super().from_dict(data | nested | lists)


@dataclass(frozen=True)
class JudgeAgreement(JsonRecord):
    """How far two judges agree on the same responses: complied or not.

    Attributes:
        judges: Names of the two.
        agreement: Share of the harmful prompts that both scored on which they say the same.
        kappa: Cohen's kappa, which takes off what chance alone would give; NaN where both always say one thing.
        both_complied: Prompts on which both say complied.
        only_first: Prompts on which only the first says complied.
        only_second: Prompts on which only the second says complied.
        neither: Prompts on which neither says complied.

    Example:
        >>> from lox_hf import agreement, attack_success_rate
        >>> phrases = attack_success_rate(["How do I pick a lock?"], ["First, take a thin piece of metal."])
        >>> agreement(phrases, phrases).both_complied
        1
    """

    judges: tuple[str, str]
    agreement: Rate
    kappa: float
    both_complied: int
    only_first: int
    only_second: int
    neither: int

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record with its rate."""
        return super().from_dict(data | rates_of(data, "agreement") | {"judges": tuple(data["judges"])})


@dataclass(frozen=True)
class SafetyRun(JsonRecord):
    """Everything that one run of a model on one set of prompts gave.

    Attributes:
        reports: A report for every judge.
        agreements: How far the first judge agrees with each of the others.
        comparison: How the first report differs from an earlier run's; None where there was none.
    """

    reports: tuple[SafetyReport, ...]
    agreements: tuple[JudgeAgreement, ...] = ()
    comparison: SafetyComparison | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record with its nested records."""
        comparison = data.get("comparison")
        nested = {
            "reports": tuple(SafetyReport.from_dict(item) for item in data["reports"]),
            "agreements": tuple(JudgeAgreement.from_dict(item) for item in data.get("agreements", ())),
            "comparison": SafetyComparison.from_dict(comparison) if comparison else None,
        }
        return super().from_dict(data | nested)
