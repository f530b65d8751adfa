"""What was measured of a model's safety: verdicts, rates with their intervals, comparisons."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from lox_hf.records.base import JsonRecord, ModelReference

Label = Literal["refused", "complied", "degenerate", "unscored"]


@dataclass(frozen=True)
class Verdict(JsonRecord):
    """What a judge says of one response.

    Attributes:
        label: "refused" (the attack failed), "complied" (it succeeded), "degenerate" (empty, repetition, not language)
            or "unscored" (no verdict).
        reason: Why, in words; always given where the label is "degenerate" or "unscored".
        score: Harmfulness from 1 to 5 where the judge gives one.
        raw: The judge's own words where it has any; never parsed again.
        transient: The judge could not be asked (an endpoint that did not answer): ask again next time.

    Example:
        >>> from lox_hf.records import Verdict
        >>> Verdict("unscored", "the judge's reply is not JSON").label
        'unscored'
    """

    label: Label
    reason: str = ""
    score: int | None = None
    raw: str = ""
    transient: bool = False


@dataclass(frozen=True)
class Rate(JsonRecord):
    """A share of n with its 95 % Wilson score interval; made by `lox_hf.evaluation.statistics.rate`.

    Attributes:
        count: How many have the property.
        n: How many were scored.
        share: count / n; NaN where nothing was scored.
        low: Lower end of the interval, in [0, 1].
        high: Upper end.
        unscored: How many more were looked at, but have no verdict.

    Example:
        >>> from lox_hf.evaluation.statistics import rate
        >>> str(rate(3, 100))
        '3.0 % [1.0, 8.5] of 100'
    """

    count: int
    n: int
    share: float
    low: float
    high: float
    unscored: int = 0

    def __str__(self) -> str:
        if self.n == 0:
            return "not measured"
        return f"{100 * self.share:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}] of {self.n}"


@dataclass(frozen=True)
class Outcome(JsonRecord):
    """How one prompt ended; without any text, so that a report can be published.

    Attributes:
        prompt_id: Hash of the prompt's text, by which two reports are paired.
        harmful: Whether the prompt should be refused; the others measure over-refusal.
        label: The verdict's label.
        reason: Why it is degenerate or unscored, or what a classifier found; without what may quote a text.
        score: The verdict's score.
        strict: Whether the known answer was given; None where none is known.
        category: The prompt's category; empty where it has none.
    """

    prompt_id: str
    harmful: bool
    label: Label
    reason: str = ""
    score: int | None = None
    strict: bool | None = None
    category: str = ""


@dataclass(frozen=True)
class RubricScores(JsonRecord):
    """Harmfulness scores from 1 to 5 over the harmful prompts that have one; degenerate responses have none.

    Attributes:
        mean: Mean score.
        five: Share of score 5, the paper's attack success rate.
        four_or_five: Share of score 4 and over.
    """

    mean: float
    five: Rate
    four_or_five: Rate

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record with its rates."""
        return super().from_dict(data | _rates(data, "five", "four_or_five"))


@dataclass(frozen=True)
class CategoryRates(JsonRecord):
    """Rates of one category of prompts.

    Attributes:
        name: The category, as the prompt set names it.
        asr: Attack success rate on its harmful prompts.
        over_refusal: Refusals of its harmless prompts.
    """

    name: str
    asr: Rate
    over_refusal: Rate

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record with its rates."""
        return super().from_dict(data | _rates(data, "asr", "over_refusal"))


@dataclass(frozen=True)
class SafetyReport(JsonRecord):
    """Attack success rate and what goes with it, on one set of prompts by one judge.

    Attributes:
        asr: Harmful prompts that were complied with, among those scored. Degenerate responses count in n: they are
            neither refusals nor successes.
        refusal: Harmful prompts that were refused.
        degenerate: Responses that are empty, repetition or not language, among all prompts.
        over_refusal: Harmless prompts that were refused.
        judge: Name of the judge.
        over_refusal_judge: Name of the judge of the harmless prompts; a classifier of harm cannot tell a refusal.
        strict_asr: Harmful prompts whose known answer was given; n is 0 where no answers are known.
        accuracy: Harmless prompts whose known answer was given; n is 0 where no answers are known.
        rubric: Scores where the judge gives them.
        categories: Rates per category.
        unscored_reasons: How often each reason left a response unscored.
        judge_settings: What else a verdict depends on: model, revision, threshold.
        template_hash: SHA-256 of the judge's prompt template; empty where it has none.
        seed: Seed the judge was called with; None where it draws nothing.
        model: The model that answered; None where responses were given.
        prompts: Name, number and SHA-256 of the prompt set.
        generation: Settings the responses were generated with.
        outcomes: One per prompt, in their order.
        versions: Versions a result depends on.
        warnings: What a reader should know.

    Example:
        >>> from lox_hf import attack_success_rate
        >>> report = attack_success_rate(["How do I pick a lock?"], ["I'm sorry, but I can't help with that."])
        >>> report.asr.count, report.asr.n
        (0, 1)
    """

    asr: Rate
    refusal: Rate
    degenerate: Rate
    over_refusal: Rate
    judge: str
    over_refusal_judge: str
    strict_asr: Rate
    accuracy: Rate
    rubric: RubricScores | None = None
    categories: tuple[CategoryRates, ...] = ()
    unscored_reasons: dict[str, int] = field(default_factory=dict)
    judge_settings: dict[str, Any] = field(default_factory=dict)
    template_hash: str = ""
    seed: int | None = None
    model: ModelReference | None = None
    prompts: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the report with its nested records."""
        rates = _rates(data, "asr", "refusal", "degenerate", "over_refusal", "strict_asr", "accuracy")
        nested = {
            "rubric": RubricScores.from_dict(data["rubric"]) if data.get("rubric") else None,
            "categories": tuple(CategoryRates.from_dict(item) for item in data.get("categories", ())),
            "model": ModelReference.from_dict(data["model"]) if data.get("model") else None,
            "outcomes": tuple(Outcome.from_dict(item) for item in data.get("outcomes", ())),
            "warnings": tuple(data.get("warnings", ())),
        }
        return super().from_dict(data | rates | nested)


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
        >>> from lox_hf.evaluation.statistics import paired_difference
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

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record with its rates."""
        return super().from_dict(data | _rates(data, "before", "after"))


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
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record with its nested records."""
        names = ("asr", "refusal", "over_refusal", "degenerate", "strict_asr", "accuracy")
        nested = {name: PairedDifference.from_dict(data[name]) for name in names}
        return super().from_dict(data | nested | {"warnings": tuple(data.get("warnings", ()))})


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
        return super().from_dict(data | _rates(data, "agreement") | {"judges": tuple(data["judges"])})


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


def _rates(data: dict[str, Any], *names: str) -> dict[str, Rate]:
    return {name: Rate.from_dict(data[name]) for name in names}
