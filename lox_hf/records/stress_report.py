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
        at_least: How many of them are lower bounds: what is asked for did not happen within the attack.
    """

    values: tuple[float, ...]
    mean: float = math.nan
    sd: float = math.nan
    n: int = 0
    at_least: int = 0

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the spread; null becomes NaN again."""
        values = tuple(math.nan if value is None else float(value) for value in data["values"])
        return super().from_dict({**data, "values": values})


@dataclass(frozen=True)
class SeedDifference(JsonRecord):
    """One figure of a model minus the aligned model's, seed by seed.

    Attributes:
        difference: model - aligned, a value per seed, with its mean and spread; NaN on a seed on which one of the two
            is not known, or does not count, as its utility collapsed.
        higher: Seeds on which the model's figure is the higher one.
        lower: Seeds on which it is the lower one.
        p_value: Two-sided exact sign-flip test of the mean; with n seeds it cannot fall below 2 / 2^n.
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

    Attributes:
        model: Name of the model in the matrix.
        attack: Name of the attack.
        learning_rate: The learning rate, of those scanned, at which the model loses its refusals soonest without
            losing its utility on most seeds; where it always does, the one at which it keeps most of it.
        scanned: Half-life by learning rate on the seeds that met all of them, as text keys ("2e-05").
        half_life: Steps until the attack success rate reaches 50 %, interpolated between readings. Where it never does
            the value is the attack's last step, counted in `at_least`.
        mean_asr: Mean attack success rate over the attack, in [0, 1].
        final_asr: Attack success rate after the last step.
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
        matched_mcnemar: Two-sided exact McNemar test over the prompts of all seeds that count, at the readings nearest
            to the matched budget. It takes the prompts of one seed as independent, so it is too sure.
        collapsed: Seeds on which less than the guard's share of utility was left: they do not count as a defence.
    """

    model: str
    attack: str
    learning_rate: float
    scanned: dict[str, Spread]
    half_life: Spread
    mean_asr: Spread
    final_asr: Spread
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
    matched_mcnemar: float = math.nan
    collapsed: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the outcome with its nested records."""
        gains = ("half_life_gain", "mean_asr_gain", "matched_gain", "equal_refusal_gain")
        spreads = (
            *("half_life", "mean_asr", "final_asr", "matched_asr", "equal_refusal_asr", "over_refusal_before"),
            *("task_accuracy", "task_loss", "utility_kept", "retention", "r_ratio"),
        )
        nested = {
            **{name: SeedDifference.from_dict(data[name]) for name in gains},
            **{name: Spread.from_dict(data[name]) for name in spreads},
            "scanned": {rate: Spread.from_dict(found) for rate, found in data["scanned"].items()},
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

    An attack that left it of no use on most seeds does not count, unless all of them did.

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
        headline: What came out, in sentences: the gain, how much of it is left at equal benign refusal, the controls.
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
    headline: tuple[str, ...]
    limits: tuple[str, ...]
    before: tuple[ModelBefore, ...]
    outcomes: tuple[AttackOutcome, ...]
    worst: tuple[WorstCase, ...] = ()
    cells: tuple[CellResult, ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()
    not_run: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

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
        }
        lists = {name: tuple(data.get(name, ())) for name in ("seeds", "headline", "limits", "notes", "not_run")}
        return super().from_dict(data | nested | lists)
