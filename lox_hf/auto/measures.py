"""What is measured of every candidate before any attack: safety, usefulness, and how far its answers have moved."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lox_hf.evaluation.divergence import AnswerReference, divergence
from lox_hf.records import Score
from lox_hf.robustness.measuring.measure import Measurement, ask_prompts, measure_utility, step_reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class CandidateMeasures:
    """A score function of loaded models, as `lox_hf.analysis.select.select` takes it.

    Attributes:
        measurement: The prompts, how they are asked and judged, and the utility.
        tokenizer: The models' tokenizer.
        reference: The aligned model's answers to harmless prompts; None leaves the divergence out.

    Example:
        >>> reference = answer_reference(model, tokenizer, prompts)  # doctest: +SKIP
        >>> score = CandidateMeasures(Measurement(prompts), tokenizer, reference).score(model)  # doctest: +SKIP
        >>> score.value("asr"), score.value("kl")  # doctest: +SKIP
        (0.01, 0.0)
    """

    measurement: Measurement
    tokenizer: "PreTrainedTokenizerBase"
    reference: AnswerReference | None = None

    def settings(self) -> dict[str, Any]:
        """Return what a score depends on besides the model, as JSON values.

        Raises:
            ConfigError: If what the utility needs is not there, or the judge is not known.
        """
        divergence_from = None if self.reference is None else self.reference.settings()
        return {**self.measurement.settings(), "divergence_from": divergence_from}

    def score(self, model: "PreTrainedModel") -> Score:
        """Measure a model.

        Args:
            model: The model; it is left as it was found.

        Returns:
            The rates of `SafetyReport` with their marks, among them "accuracy" where answers are known; "gsm8k" as a
            rate or "perplexity" as a figure where that is the utility; and the figure "kl", in nats.

        Raises:
            ConfigError: If a setting is out of range or does not fit the model.
            PromptError: If prompts, questions or texts cannot be read.
            EndpointError: If the judge's endpoint cannot be used.
            LoxError: If the memory does not suffice for a single prompt.
        """
        report = ask_prompts(model, self.tokenizer, self.measurement)
        utility = measure_utility(model, self.tokenizer, self.measurement, step_reading(report, 0))
        score = Score.of(report)
        if utility.measure == "gsm8k":
            score = score.joined(Score({"gsm8k": utility.accuracy}))
        if utility.measure == "perplexity":
            score = score.joined(Score(figures={"perplexity": utility.perplexity}))
        if self.reference is not None:
            score = score.joined(Score(figures={"kl": divergence(model, self.reference).kl}))
        return score
