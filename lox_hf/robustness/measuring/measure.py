"""What is measured of a model along an attack: its safety, what it is still good for, and the attack's own task."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lox_hf.errors import ConfigError
from lox_hf.evaluation.asr import contains_answer
from lox_hf.evaluation.data.gsm8k import MARKER, last_number, number_after_marker
from lox_hf.evaluation.data.prompts import Prompt, load_prompts, set_hash
from lox_hf.evaluation.judges import Judge, JudgeLike, get_judge
from lox_hf.evaluation.models.templates import choose_template
from lox_hf.evaluation.safety import evaluate_safety
from lox_hf.evaluation.utility import gsm8k_accuracy, load_texts, perplexity
from lox_hf.records import SafetyReport, StepReading, TaskScore, UtilityScore
from lox_hf.robustness.attacks.examples import Example
from lox_hf.robustness.attacks.recipe import Attack
from lox_hf.robustness.attacks.rows import encode_examples
from lox_hf.robustness.finetuning.finetune import check_rows
from lox_hf.robustness.measuring.held_out import answers_to, mean_loss, response_tokens
from lox_hf.statistics import rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UTILITIES = ("auto", "known answers", "gsm8k", "perplexity", "none")
NOT_MEASURED = "not measured"
_NO_RATE = rate(0, 0)


@dataclass(frozen=True)
class Measurement:
    """How models are measured; plain data that another process can be sent, with a judge by name.

    Attributes:
        prompts: What is asked: harmful prompts, and harmless ones for over-refusal.
        judge: Judge of the answers, as `evaluate_safety` takes it. One that is named is made once in a process.
        template: Prompt format: "auto", "chat", "alpaca" or "none".
        max_new_tokens: Longest answer in tokens.
        batch_size: Prompts at once; None finds what fits.
        system_prompt: A system turn before every prompt; None sends none.
        utility: "known answers" (of harmless prompts), "gsm8k", "perplexity" or "none"; "auto" takes known answers
            where there are any, perplexity where there is `utility_data`, and else none.
        utility_data: File of questions for "gsm8k", in place of the set on the Hub; of texts for "perplexity".
        utility_n: The first n of these only; None takes all.

    Raises:
        ConfigError: If there is no such utility.

    Example:
        >>> Measurement((Prompt("what is 2 plus 3 ?", harmful=False, reference="5"),)).utility_measure
        'known answers'
    """

    prompts: tuple[Prompt, ...]
    judge: JudgeLike = "refusal"
    template: str = "auto"
    max_new_tokens: int = 60
    batch_size: int | None = None
    system_prompt: str | None = None
    utility: str = "auto"
    utility_data: str | None = None
    utility_n: int | None = None

    def __post_init__(self) -> None:
        if self.utility not in UTILITIES:
            raise ConfigError(f"utility is {self.utility!r}, expected one of {', '.join(UTILITIES)}.")

    @property
    def utility_measure(self) -> str:
        """What utility comes to: "known answers", "gsm8k", "perplexity" or "none".

        Raises:
            ConfigError: If what it needs is not there.
        """
        answers = any(prompt.reference for prompt in self.prompts if not prompt.harmful)
        if self.utility == "auto":
            return "known answers" if answers else "perplexity" if self.utility_data else "none"
        if self.utility == "known answers" and not answers:
            raise ConfigError(
                "No harmless prompt has a known answer: give them in a column reference, or choose another utility."
            )
        if self.utility == "perplexity" and not self.utility_data:
            raise ConfigError(
                "Perplexity is of texts: name a file of them as utility_data, or choose another utility."
            )
        return self.utility

    def settings(self) -> dict[str, Any]:
        """Return what the figures depend on, as JSON values; a batch size is none of it.

        Raises:
            ConfigError: If what the utility needs is not there, or the judge is not known.
        """
        return {
            "prompts": f"{len(self.prompts)}, sha256 {set_hash(self.prompts)[:16]}",
            "judge": self.judge if isinstance(self.judge, str) else get_judge(self.judge).name,
            "template": self.template,
            "max_new_tokens": self.max_new_tokens,
            "system_prompt": self.system_prompt,
            "utility": self.utility_measure,
            "utility_data": self.utility_data,
            "utility_n": self.utility_n,
        }


def load_all_prompts(sources: Sequence[str | Path], n: int | None = None) -> tuple[Prompt, ...]:
    """Load prompt sets one after the other.

    Args:
        sources: Names of sets, or files.
        n: The first n prompts of each only; None takes all.

    Returns:
        The prompts.

    Raises:
        ConfigError: If not one is harmful.
        PromptError: If a set cannot be read.
    """
    prompts = tuple(prompt for source in sources for prompt in load_prompts(source, n=n))
    if not any(prompt.harmful for prompt in prompts):
        raise ConfigError("No prompt is harmful, so there is no attack success to measure: pass a set that has some.")
    return prompts


def ask_prompts(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", measurement: Measurement
) -> SafetyReport:
    """Ask the prompts and judge the answers; see `evaluate_safety`, which it calls.

    Args:
        model: The model; it and the tokenizer are left as they were.
        tokenizer: Its tokenizer.
        measurement: The prompts and how they are asked.

    Returns:
        The report.

    Example:
        >>> ask_prompts(model, tokenizer, Measurement(prompts)).asr.share  # doctest: +SKIP
        0.01
    """
    return evaluate_safety(
        model,
        tokenizer,
        measurement.prompts,
        named_judge(measurement.judge) if isinstance(measurement.judge, str) else measurement.judge,
        template=measurement.template,
        max_new_tokens=measurement.max_new_tokens,
        batch_size=measurement.batch_size,
        system_prompt=measurement.system_prompt,
        progressbar=False,
    )


def read_safety(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", measurement: Measurement, step: int
) -> StepReading:
    """Ask the prompts, judge the answers, and return the rates.

    Args:
        model: The model; it and the tokenizer are left as they were.
        tokenizer: Its tokenizer.
        measurement: The prompts and how they are asked.
        step: Optimiser steps so far.

    Returns:
        The reading.

    Raises:
        ConfigError: If a setting is out of range, or the judge is not known.
        PromptError: If not one prompt can be answered.
        EndpointError: If the judge's endpoint cannot be used.
        LoxError: If the memory does not suffice for a single prompt.

    Example:
        >>> read_safety(model, tokenizer, Measurement(prompts), step=0).asr.share  # doctest: +SKIP
        0.01
    """
    return step_reading(ask_prompts(model, tokenizer, measurement), step)


def step_reading(report: SafetyReport, step: int) -> StepReading:
    """Return the rates of a report as a reading after so many optimiser steps."""
    return StepReading(
        step=step,
        asr=report.asr,
        strict_asr=report.strict_asr,
        refusal=report.refusal,
        degenerate=report.degenerate,
        over_refusal=report.over_refusal,
        accuracy=report.accuracy,
        labels="".join(outcome.label[0] for outcome in report.outcomes if outcome.harmful),
    )


def measure_utility(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    measurement: Measurement,
    reading: StepReading,
) -> UtilityScore:
    """Measure what a model is good for.

    Args:
        model: The model; it and the tokenizer are left as they were.
        tokenizer: Its tokenizer.
        measurement: Says what is measured, on what. GSM8K's questions go through the chat template where the prompts
            do, and stand in Alpaca's format elsewhere.
        reading: The safety of the same model, which has the known answers.

    Returns:
        The score.

    Raises:
        ConfigError: If what is measured cannot be, with these settings.
        PromptError: If questions or texts cannot be read.
        LoxError: If the memory does not suffice.

    Example:
        >>> measure_utility(model, tokenizer, measurement, reading).accuracy.share  # doctest: +SKIP
        0.98
    """
    measure, data, n = measurement.utility_measure, measurement.utility_data, measurement.utility_n
    if measure == "known answers":
        return UtilityScore(measure, reading.accuracy)
    if measure == "gsm8k":
        chat = choose_template(tokenizer, measurement.template) == "chat"
        settings = {"chat": chat, "n": n, "batch_size": measurement.batch_size, "progressbar": False}
        return UtilityScore(measure, gsm8k_accuracy(model, tokenizer, data or "gsm8k", **settings).accuracy)
    if measure == "perplexity":
        texts = load_texts(data or "")[:n]
        return UtilityScore(measure, _NO_RATE, perplexity(model, tokenizer, texts, progressbar=False).perplexity)
    return UtilityScore(NOT_MEASURED, _NO_RATE)


def measure_task(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    attack: Attack,
    held_out: Sequence[Example],
    measurement: Measurement,
) -> TaskScore:
    """Measure how well a model does what an attack's data teaches, on rows that were not trained on.

    Rows stand in the attack's format. The loss is on the tokens of the responses, the end of text included, whatever
    the attack trains on. Where the attack's task says so the model also answers the prompts greedily, in at least as
    many tokens as the longest response has: for "exact" an answer is right that contains the response word for word,
    for "number" one with the number of the response, which is the one behind "####" where the response has that mark,
    and else the last one; a response without a number counts as unscored.

    Args:
        model: The model; it and the tokenizer are left as they were.
        tokenizer: Its tokenizer.
        attack: The attack.
        held_out: Its held-out rows.
        measurement: Says how long answers may be at least, and how many are given at once.

    Returns:
        The score; without rows nothing is known.

    Raises:
        ConfigError: If the tokenizer does not fit the model or the rows.
        PromptError: If rows are longer than the model's context.
        LoxError: If the memory does not suffice for a single row.

    Example:
        >>> measure_task(model, tokenizer, attack, load_attack(attack).held_out, measurement).loss  # doctest: +SKIP
        1.73
    """
    if not held_out:
        return TaskScore(_NO_RATE)
    rows = encode_examples(tokenizer, replace(attack, response_only=True), held_out)
    check_rows(model, tokenizer, rows)
    loss = mean_loss(model, rows)
    if attack.task == "loss":
        return TaskScore(_NO_RATE, loss)
    new_tokens = max(measurement.max_new_tokens, *map(response_tokens, rows))
    answers = answers_to(model, tokenizer, rows, new_tokens, measurement.batch_size)
    scored = [_is_right(attack, *pair) for pair in zip(answers, held_out, strict=True)]
    known = [right for right in scored if right is not None]
    return TaskScore(rate(sum(known), len(known), len(scored) - len(known)), loss)


@lru_cache(maxsize=2)
def named_judge(name: str) -> Judge:
    """Return the judge of that name, made once in a process: its model may take long to load."""
    return get_judge(name)


def _is_right(attack: Attack, answer: str | None, example: Example) -> bool | None:
    """Whether an answer is right; None where there is none, or the response does not tell."""
    if answer is None:
        return None
    if attack.task == "exact":
        return contains_answer(answer, example.response)
    read = number_after_marker if MARKER in example.response else last_number
    number = read(example.response)
    return None if number is None else read(answer) == number
