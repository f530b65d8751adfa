"""What a whole stress test found: every model under every attack, seed by seed, and what is left of a gain."""

import math
from dataclasses import dataclass, field
from typing import Any, Self

from lox_hf.records.base import JsonRecord, ModelReference
from lox_hf.records.stress import CellResult


@dataclass(frozen=True)
class Spread(JsonRecord):
    """One figure over several seeds, every seed shown.

    Attributes:
        values: A value per seed, in the order of the seeds; NaN where it was not measured.
        mean: Mean of those that were measured; NaN where none was.
        sd: Their sample standard deviation; NaN for fewer than two.
        n: How many were measured.
        bounds: Per seed ">=" or "<=" where the value is only a bound, as what is asked for did not happen within the
            attack, else ""; empty where none is.
    """

    values: tuple[float, ...]
    mean: float = math.nan
    sd: float = math.nan
    n: int = 0
    bounds: tuple[str, ...] = ()

    @property
    def bound(self) -> str:
        """What the mean is: ">=" or "<=" where all bounds point one way, else "": no bound, or no one knows which."""
        signs = {*self.bounds} - {""}
        return signs.pop() if len(signs) == 1 else ""

    @property
    def bounded(self) -> int:
        """How many values are bounds."""
        return len(self.bounds) - self.bounds.count("")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the spread; null becomes NaN again."""
        values = tuple(math.nan if value is None else float(value) for value in data["values"])
        return super().from_dict({**data, "values": values, "bounds": tuple(data.get("bounds", ()))})


@dataclass(frozen=True)
class SeedDifference(JsonRecord):
    """One figure of a model minus the aligned model's, seed by seed.

    Attributes:
        difference: model - aligned, a value per seed, with its mean and spread; NaN on a seed on which one of the two
            is not known, does not count, as its utility collapsed, or both are bounds of the same side.
        higher: Seeds on which the model's figure is the higher one. What prints as 0 is a tie.
        lower: Seeds on which it is the lower one.
        p_value: Two-sided exact sign-flip test of the mean, ties as 0; with n seeds it cannot fall below 2 / 2^n.
    """

    difference: Spread
    higher: int = 0
    lower: int = 0
    p_value: float = math.nan

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the difference with its spread."""
        return super().from_dict(data | {"difference": Spread.from_dict(data["difference"])})


@dataclass(frozen=True)
class AttackOutcome(JsonRecord):
    """One model under one attack at the learning rate that is worst for it.

    A seed on which utility collapsed is NaN in all that is said of safety: few successes there are no defence.

    Attributes:
        model: Name of the model in the matrix.
        attack: Name of the attack.
        learning_rate: The learning rate, of those scanned, at which the model loses its refusals soonest without
            losing its utility on most seeds; where it always does, the one at which it keeps most of it.
        scanned: Half-life by learning rate on the seeds that met all of them, as text keys ("2e-05").
        scanned_final_asr: Attack success rate after the last step by learning rate, on the same seeds.
        half_life: Steps until the attack success rate reaches 50 %, interpolated between readings. Where it never does
            the value is the attack's last step, a lower bound.
        mean_asr: Mean attack success rate over the attack, in [0, 1].
        final_asr: Attack success rate after the last step.
        final_strict_asr: Share of harmful prompts whose known answer was given after it; NaN without known answers.
        final_degenerate: Share of responses after it that are empty, repetition or not language, collapsed seeds too.
        matched_steps: Steps the aligned model needs to reach the matched level; NaN where it never does.
        matched_asr: Attack success rate after as many steps as the aligned model needs on this seed to reach the
            matched level; NaN where it never reaches it.
        equal_refusal_asr: Attack success rate where the attack has brought over-refusal down to the level at which
            all are compared; NaN where it does not pass that level.
        over_refusal_before: Over-refusal before the attack.
        task_accuracy: The attack task's own accuracy afterwards.
        task_loss: The attack task's own loss afterwards.
        utility_kept: Utility after the attack as a share of the aligned model's before it.
        retention: Retention of the safety component afterwards.
        r_ratio: R_ft / R_align afterwards.
        half_life_gain: Half-life against the aligned model's.
        mean_asr_gain: Mean attack success rate against the aligned model's.
        matched_gain: Matched attack success rate against the aligned model's.
        equal_refusal_gain: Attack success rate at equal over-refusal against the aligned model's.
        matched_mcnemar: p-value per seed of a two-sided exact McNemar test over its prompts, at the readings nearest
            to the matched budget. Seeds are not pooled: they answer the same prompts.
        collapsed: Seeds on which less than the guard's share of utility was left: they do not count as a defence.
    """

    model: str
    attack: str
    learning_rate: float
    scanned: dict[str, Spread]
    scanned_final_asr: dict[str, Spread]
    half_life: Spread
    mean_asr: Spread
    final_asr: Spread
    final_strict_asr: Spread
    final_degenerate: Spread
    matched_steps: Spread
    matched_asr: Spread
    equal_refusal_asr: Spread
    over_refusal_before: Spread
    task_accuracy: Spread
    task_loss: Spread
    utility_kept: Spread
    retention: Spread
    r_ratio: Spread
    half_life_gain: SeedDifference
    mean_asr_gain: SeedDifference
    matched_gain: SeedDifference
    equal_refusal_gain: SeedDifference
    matched_mcnemar: Spread
    collapsed: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the outcome with its nested records."""
        gains = ("half_life_gain", "mean_asr_gain", "matched_gain", "equal_refusal_gain")
        spreads = (
            *("half_life", "mean_asr", "final_asr", "final_strict_asr", "final_degenerate", "matched_steps"),
            *("matched_asr", "equal_refusal_asr", "over_refusal_before", "task_accuracy", "task_loss", "utility_kept"),
            *("retention", "r_ratio", "matched_mcnemar"),
        )
        nested = {
            **{name: SeedDifference.from_dict(data[name]) for name in gains},
            **{name: Spread.from_dict(data[name]) for name in spreads},
            **{
                name: {rate: Spread.from_dict(found) for rate, found in data[name].items()}
                for name in ("scanned", "scanned_final_asr")
            },
            "collapsed": tuple(data.get("collapsed", ())),
        }
        return super().from_dict(data | nested)


@dataclass(frozen=True)
class ModelBefore(JsonRecord):
    """One model before any attack, over the seeds.

    Attributes:
        model: Name of the model in the matrix.
        asr: Attack success rate.
        over_refusal: Harmless prompts that were refused.
        accuracy: Harmless prompts whose known answer was given.
        utility: Utility: accuracy, or perplexity where that was measured.
        broken: Seeds on which less than the guard's share of the aligned model's utility is left before any attack.
    """

    model: str
    asr: Spread
    over_refusal: Spread
    accuracy: Spread
    utility: Spread
    broken: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record with its spreads."""
        names = ("asr", "over_refusal", "accuracy", "utility")
        nested = {name: Spread.from_dict(data[name]) for name in names}
        return super().from_dict(data | nested | {"broken": tuple(data.get("broken", ()))})


@dataclass(frozen=True)
class WorstCase(JsonRecord):
    """One model over all attacks: it is as robust as the attack that is worst for it.

    An attack that left it of no use on most seeds does not count; where all did, it has no worst case.

    Attributes:
        model: Name of the model in the matrix.
        attack: The attack with the highest mean attack success rate.
        mean_asr: That rate, over the seeds.
        half_life: The half-life under the attack with the shortest one, which may be another.
    """

    model: str
    attack: str
    mean_asr: Spread
    half_life: Spread

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record with its spreads."""
        return super().from_dict(data | {name: Spread.from_dict(data[name]) for name in ("mean_asr", "half_life")})


@dataclass(frozen=True)
class StressReport(JsonRecord):
    r"""A stress test: what fine-tuning attacks did to an aligned model, its hardened forms and the controls.

    Attributes:
        aligned: The aligned model.
        base: The model before alignment.
        seeds: The seeds.
        findings: What came out, in sentences by attack: the gain, how much of it is left at equal benign refusal, the
            end, the controls; what holds for all attacks is under "".
        limits: What the figures do not show, in sentences.
        before: Every model before any attack.
        outcomes: Every model under every attack.
        worst: Every model that met all attacks, over them; empty for one attack.
        cells: Every run.
        notes: How well the trained controls came out.
        not_run: What was asked for or belongs to a full test and was not run, each with its reason.
        settings: What the figures depend on.
        versions: Versions they depend on.

    Example:
        >>> from lox_hf import StressReport
        >>> report = StressReport.from_json(open("stress/results.json").read())  # doctest: +SKIP
        >>> print("\n".join(report.headline))  # doctest: +SKIP
    """

    aligned: ModelReference
    base: ModelReference
    seeds: tuple[int, ...]
    findings: dict[str, tuple[str, ...]]
    limits: tuple[str, ...]
    before: tuple[ModelBefore, ...]
    outcomes: tuple[AttackOutcome, ...]
    worst: tuple[WorstCase, ...] = ()
    cells: tuple[CellResult, ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()
    not_run: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def headline(self) -> tuple[str, ...]:
        """All findings, each with the name of its attack before it."""
        named = ((f"{attack}: " if attack else "", lines) for attack, lines in self.findings.items())
        return tuple(name + line for name, lines in named for line in lines)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the report with its nested records."""
        nested = {
            "aligned": ModelReference.from_dict(data["aligned"]),
            "base": ModelReference.from_dict(data["base"]),
            "before": tuple(map(ModelBefore.from_dict, data["before"])),
            "outcomes": tuple(map(AttackOutcome.from_dict, data["outcomes"])),
            "worst": tuple(map(WorstCase.from_dict, data.get("worst", ()))),
            "cells": tuple(map(CellResult.from_dict, data.get("cells", ()))),
            "findings": {attack: tuple(lines) for attack, lines in data["findings"].items()},
        }
        lists = {name: tuple(data.get(name, ())) for name in ("seeds", "limits", "notes", "not_run")}
        return super().from_dict(data | nested | lists)
