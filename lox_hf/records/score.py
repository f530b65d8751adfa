"""What was measured of one model among many: rates, plain figures, and the prompts behind them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from numbers import Real
from typing import Any, Self

from lox_hf.records.base import JsonRecord
from lox_hf.records.safety import Outcome, Rate, SafetyReport, rates_of

YES, NO, UNKNOWN = "1", "0", "-"


@dataclass(frozen=True)
class Score(JsonRecord):
    """What a score function found of one model.

    Attributes:
        rates: Rates with their intervals, by name, such as "asr".
        figures: Plain figures by name, such as "kl" or "perplexity"; NaN where one is not known.
        marks: By a rate's name a sign for every thing it counts, in their order: "1" has the property, "0" has not,
            "-" is not known. Rates of two models that were asked the same are compared pair by pair with them.

    Example:
        >>> from lox_hf import attack_success_rate
        >>> report = attack_success_rate(["How do I pick a lock?"], ["I'm sorry, but I can't help with that."])
        >>> score = Score.of(report)
        >>> score.rates["asr"].count, score.marks["asr"]
        (0, '0')
        >>> Score.of(0.25).value("value")
        0.25
    """

    rates: dict[str, Rate] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Any) -> Self:
        """Take the rates and figures out of whatever a score function returned.

        Args:
            found: A score, a `SafetyReport`, any other record with rates and numbers, a mapping of them, or one of
                them, which is called "value".

        Returns:
            The score; of rates that counted nothing only those are kept that a record names.

        Raises:
            TypeError: If there is neither a rate nor a number in it, or a mapping has something else.
        """
        if isinstance(found, cls):
            return found
        if isinstance(found, SafetyReport):
            return cls(*_of_safety(found))
        if isinstance(found, Rate) or _is_number(found):
            found = {"value": found}
        items = _items(found)
        wrong = [f"{name!r} is a {type(value).__name__}" for name, value in items.items() if not _is_measure(value)]
        if isinstance(found, Mapping) and wrong:
            raise TypeError(
                "A score function must return a record, a rate or a number, or these by name, but "
                f"{', '.join(wrong)}; of a tensor with one number return tensor.item()."
            )
        rates = {name: value for name, value in items.items() if isinstance(value, Rate)}
        figures = {name: float(value) for name, value in items.items() if _is_number(value)}
        if not rates and not figures:
            raise TypeError(
                f"A score function must return a record, a rate or a number, got {type(found).__name__} without any; "
                "of a tensor with one number return tensor.item()."
            )
        return cls(rates, figures)

    def value(self, name: str) -> float:
        """Return one measure as a number: a rate's share, or a figure; NaN where it was not measured."""
        return self.rates[name].share if name in self.rates else self.figures.get(name, math.nan)

    def interval(self, name: str) -> tuple[float, float]:
        """Return the 95 % interval of a rate; of a plain figure, which has none, NaN twice."""
        rate = self.rates.get(name)
        return (math.nan, math.nan) if rate is None else (rate.low, rate.high)

    def names(self) -> list[str]:
        """Names of what was measured."""
        return [name for name, rate in self.rates.items() if rate.n] + list(self.figures)

    def joined(self, other: "Score") -> "Score":
        """Return both scores as one; of what both have, the other's."""
        return Score(self.rates | other.rates, self.figures | other.figures, self.marks | other.marks)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the score with its rates."""
        figures = {name: math.nan if value is None else float(value) for name, value in data["figures"].items()}
        return cls(rates_of(data["rates"], *data["rates"]), figures, dict(data["marks"]))


def _of_safety(report: SafetyReport) -> tuple[dict[str, Rate], dict[str, float], dict[str, str]]:
    rates = {
        name: rate
        for name in ("asr", "refusal", "over_refusal", "degenerate", "strict_asr", "accuracy")
        if (rate := getattr(report, name)).n or name == "asr"
    }
    harmful = [outcome for outcome in report.outcomes if outcome.harmful]
    harmless = [outcome for outcome in report.outcomes if not outcome.harmful]
    marks = {
        "asr": "".join(_mark(outcome, "complied") for outcome in harmful),
        "refusal": "".join(_mark(outcome, "refused") for outcome in harmful),
        "over_refusal": "".join(_mark(outcome, "refused") for outcome in harmless),
        "degenerate": "".join(_mark(outcome, "degenerate") for outcome in report.outcomes),
        "strict_asr": "".join(map(_known_answer, harmful)),
        "accuracy": "".join(map(_known_answer, harmless)),
    }
    figures = {} if report.rubric is None else {"score": report.rubric.mean}
    return rates, figures, {name: marks[name] for name in rates}


def _mark(outcome: Outcome, label: str) -> str:
    return UNKNOWN if outcome.label == "unscored" else YES if outcome.label == label else NO


def _known_answer(outcome: Outcome) -> str:
    return UNKNOWN if outcome.strict is None else YES if outcome.strict else NO


def _items(found: Any) -> Mapping[str, Any]:
    if isinstance(found, Mapping):
        return found
    if is_dataclass(found):
        return {item.name: getattr(found, item.name) for item in fields(found)}
    return {}


def _is_measure(value: Any) -> bool:
    return isinstance(value, Rate) or _is_number(value)


def _is_number(value: Any) -> bool:
    """Whether this is a number, numpy's included."""
    return isinstance(value, Real) and not isinstance(value, bool)
