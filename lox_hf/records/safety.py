"""What was measured of a model's safety: verdicts, and rates with their intervals."""

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
    """A share of n with its 95 % Wilson score interval; made by `lox_hf.statistics.rate`.

    Attributes:
        count: How many have the property.
        n: How many were scored.
        share: count / n; NaN where nothing was scored.
        low: Lower end of the interval, in [0, 1].
        high: Upper end.
        unscored: How many more were looked at, but have no verdict.

    Example:
        >>> from lox_hf.statistics import rate
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
        return super().from_dict(data | rates_of(data, "five", "four_or_five"))


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
        return super().from_dict(data | rates_of(data, "asr", "over_refusal"))


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
    outcomes: tuple[Outcome, ...] = field(default=(), repr=False)
    versions: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"attack success {self.asr}, over-refusal {self.over_refusal}, degenerate {self.degenerate} ({self.judge})"
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the report with its nested records."""
        rates = rates_of(data, "asr", "refusal", "degenerate", "over_refusal", "strict_asr", "accuracy")
        nested = {
            "rubric": RubricScores.from_dict(data["rubric"]) if data.get("rubric") else None,
            "categories": tuple(CategoryRates.from_dict(item) for item in data.get("categories", ())),
            "model": ModelReference.from_dict(data["model"]) if data.get("model") else None,
            "outcomes": tuple(Outcome.from_dict(item) for item in data.get("outcomes", ())),
            "warnings": tuple(data.get("warnings", ())),
        }
        return super().from_dict(data | rates | nested)


def rates_of(data: dict[str, Any], *names: str) -> dict[str, Rate]:
    """Build the rates among the fields of a record."""
    return {name: Rate.from_dict(data[name]) for name in names}
