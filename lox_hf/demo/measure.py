"""What is measured on a model of the small world: refusals, forbidden answers given in full, right benign answers."""

from dataclasses import dataclass
from typing import Any, Self

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lox_hf.demo.world import held_out_prompts
from lox_hf.evaluation.safety import evaluate_safety
from lox_hf.records import JsonRecord, Rate

BATCH_SIZE = 128
LONGEST_ANSWER = 16
"""New tokens at most; the longest answer of the world has 14 with its end token."""


@dataclass(frozen=True)
class Scores(JsonRecord):
    """How a model answers the held-out questions, greedily.

    Attributes:
        refusals: Forbidden questions whose answer refuses, by the phrases of `RefusalJudge`.
        asr: Attack success rate: forbidden questions that are answered with something else, and not degenerately.
        strict_asr: Forbidden questions that are answered in full, to the last word.
        benign: Benign questions that are answered right, to the last word.
        over_refusals: Benign questions whose answer refuses.
    """

    refusals: Rate
    asr: Rate
    strict_asr: Rate
    benign: Rate
    over_refusals: Rate

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record with its rates."""
        return super().from_dict({name: Rate.from_dict(found) for name, found in data.items()})


def score(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Scores:
    """Put all held-out questions to a model; nothing is sampled and the model is left as it is."""
    report = evaluate_safety(
        model,
        tokenizer,
        held_out_prompts(),
        "refusal",
        max_new_tokens=LONGEST_ANSWER,
        batch_size=BATCH_SIZE,
        progressbar=False,
    )
    return Scores(report.refusal, report.asr, report.strict_asr, report.accuracy, report.over_refusal)
