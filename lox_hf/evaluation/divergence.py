"""How far a model's answers have moved: KL divergence from another model along that model's own answers."""

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from lox_hf.errors import ConfigError, PromptError
from lox_hf.evaluation.data.prompts import Prompt, set_hash
from lox_hf.evaluation.models.batch_size import fitting_batch_size, run_in_batches
from lox_hf.evaluation.models.chat import ask
from lox_hf.evaluation.models.checks import check_vocabulary, model_name
from lox_hf.evaluation.models.likelihood import Window, fitting_windows, padded_logits
from lox_hf.evaluation.models.local import LocalModel, left_as_found
from lox_hf.evaluation.models.templates import encode
from lox_hf.evaluation.models.tokens import special_tokens
from lox_hf.records import DivergenceReport
from lox_hf.statistics import CONFIDENCE, RESAMPLES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Result = TypeVar("Result")


@dataclass(frozen=True)
class AnswerReference:
    """A model's own answers to harmless prompts, with what it thought at each of their tokens.

    Attributes:
        answers: Token ids of each prompt with the answer behind it, the longest first; `predicted` of a window is the
            length of the answer.
        log_probabilities: Of each answer the log-probabilities of every next token, (tokens, vocabulary), float32, on
            the CPU. All of them take prompts * tokens * vocabulary * 4 bytes: for 100 prompts of 16 tokens 205 MB with
            a vocabulary of 32,000, and 821 MB with Llama 3's of 128,256.
        sha256: SHA-256 of the prompts.
        batch_size: Prompts that were read at once; None found what fits.
    """

    answers: tuple[Window, ...]
    log_probabilities: tuple[Tensor, ...]
    sha256: str
    batch_size: int | None = None

    def settings(self) -> dict[str, str]:
        """Return what a divergence depends on besides the two models, as JSON values: hashes."""
        answers = json.dumps([(answer.ids, answer.predicted) for answer in self.answers])
        return {"prompts": self.sha256, "answers": hashlib.sha256(answers.encode()).hexdigest()}


def answer_reference(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Prompt],
    *,
    tokens: int = 16,
    template: str = "auto",
    system_prompt: str | None = None,
    batch_size: int | None = None,
) -> AnswerReference:
    """Let a model answer harmless prompts greedily, and keep its log-probabilities along its answers.

    Args:
        model: The model that others will be compared with, such as the aligned one; it is left as it was found.
        tokenizer: Its tokenizer.
        prompts: Harmless prompts: texts, or `Prompt`s, of which the harmful ones are left out.
        tokens: Tokens of an answer, the first; an answer that ends before is taken with its end.
        template: Prompt format: "auto", "chat", "alpaca" or "none", as `evaluate_safety` takes it.
        system_prompt: A system turn before every prompt; None sends none.
        batch_size: Prompts at once; None takes what keeps the logits under 1 GiB, 64 at most.

    Returns:
        The reference.

    Raises:
        ConfigError: If a setting is out of range, or the tokenizer is not the model's.
        PromptError: If no prompt is harmless, or not one fits into the model's context.
        UnsupportedModelError: If the model does not predict the next token.
        LoxError: If the memory does not suffice for a single prompt.

    Example:
        >>> reference = answer_reference(aligned, tokenizer, ["How do I boil an egg?"])  # doctest: +SKIP
        >>> divergence(hardened, reference).kl  # doctest: +SKIP
        0.013
    """
    harmless = [prompt for prompt in map(_as_harmless, prompts) if not prompt.harmful]
    if not harmless:
        raise PromptError(
            f"Cannot measure the divergence on {len(prompts)} prompts: none is harmless. Pass a set that has some, "
            "labelled harmless, benign, safe or 0."
        )
    answering = _Answering(model, tokenizer, template=template, max_new_tokens=tokens, batch_size=batch_size)
    answers = answering.windows([prompt.text for prompt in harmless], system_prompt)
    found = _along(model, answers, batch_size, lambda _, logits: logits.log_softmax(-1).cpu())
    return AnswerReference(answers, tuple(found), set_hash(harmless), batch_size)


def divergence(model: "PreTrainedModel", reference: AnswerReference, *, seed: int = 0) -> DivergenceReport:
    """Return KL(reference || model) of the next token, averaged along the reference's answers.

    The model reads the reference's answers, and at every token of them its distribution q is compared with the
    reference's p: sum_v p log(p / q) - p + q over the vocabulary, which is KL(p || q) for distributions, is never
    negative, and does not feel that float32 sums them to 1 up to rounding. Positions of a prompt are averaged first,
    then prompts, so that each prompt counts alike. Log-probabilities are float32, sums float64. Of the very model that
    gave the reference it is exactly 0, read in the same batches.

    Args:
        model: The model, with the reference's vocabulary; it is left as it was found.
        reference: What `answer_reference` gives.
        seed: Seed of the bootstrap over prompts; no global seed is touched.

    Returns:
        The divergence in nats with its 95 % interval; infinite where the model rules a token out that the reference
        does not, NaN where its numbers are not.

    Raises:
        ConfigError: If the model has another vocabulary.
        LoxError: If the memory does not suffice for a single prompt.

    Example:
        >>> divergence(hardened, reference).kl  # doctest: +SKIP
        0.013

    Source: Kullback and Leibler, Annals of Mathematical Statistics 22, 1951.
    """
    known = reference.log_probabilities

    def compare(place: int, logits: Tensor) -> float:
        if logits.shape[-1] != known[place].shape[-1]:
            raise ConfigError(
                f"Cannot compare '{model_name(model)}' with the reference: its vocabulary has {logits.shape[-1]} "
                f"tokens and the reference's {known[place].shape[-1]}. Both must read the same tokens: compare a "
                "model with the one that it was made from."
            )
        return _mean_divergence(known[place], logits.log_softmax(-1).cpu())

    means = sorted(_along(model, reference.answers, reference.batch_size, compare))
    low, high = _mean_interval(means, seed)
    positions = sum(window.predicted for window in reference.answers)
    return DivergenceReport(math.fsum(means) / len(means), low, high, len(means), positions, reference.sha256)


class _Answering(LocalModel):
    """A model whose answers are kept as tokens, behind the prompts that they answer."""

    def windows(self, texts: Sequence[str], system_prompt: str | None) -> tuple[Window, ...]:
        special = special_tokens(self._tokenizer)  # once: of thousands it takes long
        prompts = [
            encode(self._tokenizer, ask(text, system_prompt), self.template, self._variables, special=special)
            for text in texts
        ]
        check_vocabulary(self._model, self._tokenizer, prompts)
        refused = self._refused(prompts)
        if refused:
            warnings.warn(
                f"{len(refused)} of {len(prompts)} prompts are empty or too long for '{self.name}' and are left out.",
                stacklevel=3,
            )
        prompts = [prompt for place, prompt in enumerate(prompts) if place not in refused]
        prompts.sort(key=lambda prompt: -len(prompt))
        longest = len(prompts[0])
        batches = run_in_batches(
            self._generate,
            prompts,
            self.batch_size or fitting_batch_size(self._model, longest + self._max_new_tokens),
            device=self._model.device,
            one=f"one prompt of {longest} tokens: ask fewer tokens, or load the model in a smaller dtype.",
        )
        answers = [
            Window(prompt + answer, len(answer))
            for _, batch, rows in batches
            for prompt, answer in zip(batch, map(self._up_to_end, rows), strict=True)
        ]
        return tuple(sorted(answers, key=lambda window: -len(window.ids)))

    def _up_to_end(self, row: list[int]) -> list[int]:
        """An answer with the token that ends it; what stands behind is padding."""
        ends = self._ends()
        return row[: next((place for place, token in enumerate(row, 1) if token in ends), len(row))]


def _along(
    model: "PreTrainedModel",
    answers: Sequence[Window],
    batch_size: int | None,
    use: Callable[[int, Tensor], Result],
) -> list[Result]:
    """What is made of each answer's number and its float32 logits, (tokens, vocabulary)."""

    def read(batch: Sequence[int]) -> list[Result]:
        logits, _ = padded_logits(model, [answers[place] for place in batch])
        return [use(place, _of_answer(row, answers[place])) for place, row in zip(batch, logits, strict=True)]

    longest = len(answers[0].ids)
    batches = run_in_batches(
        read,
        range(len(answers)),
        batch_size or fitting_windows(model, longest),
        device=model.device,
        one=f"one answer of {longest} tokens, its prompt included: leave the longest prompts out.",
    )
    with left_as_found(model):
        return [found for _, _, some in batches for found in some]


def _of_answer(logits: Tensor, answer: Window) -> Tensor:
    """The logits that predict an answer's tokens: each stands one place before its token."""
    end = len(answer.ids) - 1
    return logits[end - answer.predicted : end].float()


def _mean_divergence(reference: Tensor, other: Tensor) -> float:
    """Mean over positions of sum p log(p / q) - p + q, both given as log-probabilities."""
    p, q = reference.double(), other.double()
    # Where p is 0 nothing is left of p log(p / q), whatever q is.
    logs = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
    return (logs - p.exp() + q.exp()).sum(-1).mean().item()


def _mean_interval(values: Sequence[float], seed: int) -> tuple[float, float]:
    """95 % percentile interval of a mean, by a bootstrap over the values."""
    import numpy as np

    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    generator, found = np.random.default_rng(seed), np.asarray(values)
    means = [found[generator.integers(len(found), size=len(found))].mean() for _ in range(RESAMPLES)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _as_harmless(prompt: str | Prompt) -> Prompt:
    return Prompt(prompt, harmful=False) if isinstance(prompt, str) else prompt
