"""What was measured of a model's usefulness."""

from dataclasses import dataclass, field
from typing import Any, Self

from lox_hf.records.base import JsonRecord, ModelReference
from lox_hf.records.safety import Rate


@dataclass(frozen=True)
class AccuracyReport(JsonRecord):
    """Exact-match accuracy on questions with a known number.

    Attributes:
        accuracy: Right answers among the questions that were answered; one without a readable number is wrong.
        unreadable: Questions whose answer has no number where one is expected.
        right: For every question, in order, whether it was answered right.
        model: The model that answered.
        questions: Name, number and SHA-256 of the questions.
        generation: Settings the answers were generated with.
        versions: Versions a result depends on.

    Example:
        >>> from lox_hf import gsm8k_accuracy
        >>> print(gsm8k_accuracy(model, tokenizer).accuracy)  # doctest: +SKIP
        36.5 % [33.9, 39.1] of 1319
    """

    accuracy: Rate
    unreadable: int
    right: tuple[bool, ...] = ()
    model: ModelReference | None = None
    questions: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the report with its nested records."""
        nested = {
            "accuracy": Rate.from_dict(data["accuracy"]),
            "right": tuple(data.get("right", ())),
            "model": ModelReference.from_dict(data["model"]) if data.get("model") else None,
        }
        return super().from_dict(data | nested)


@dataclass(frozen=True)
class PerplexityReport(JsonRecord):
    """Perplexity of texts under a model.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per token over all texts; NaN where no token was predicted.
        tokens: Tokens that were predicted.
        texts: Texts they belong to.
        sha256: SHA-256 of the texts.
        max_length: Tokens of a window.
        stride: Tokens from one window to the next.
        dtype: Dtype of the model, such as "bfloat16".
        model: The model.
        versions: Versions a result depends on.

    Example:
        >>> from lox_hf import perplexity
        >>> perplexity(model, tokenizer, ["Some text."]).perplexity  # doctest: +SKIP
        12.3
    """

    perplexity: float
    tokens: int
    texts: int
    sha256: str
    max_length: int
    stride: int
    dtype: str
    model: ModelReference | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the report with its model."""
        model = ModelReference.from_dict(data["model"]) if data.get("model") else None
        return super().from_dict(data | {"model": model})
