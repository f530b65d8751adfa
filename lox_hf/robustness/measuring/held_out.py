"""Rows of token ids that a model was not trained on: their loss, and the model's own answers to their prompts."""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from lox_hf.evaluation.models.batch_size import fitting_batch_size, run_in_batches
from lox_hf.evaluation.models.checks import context_length
from lox_hf.evaluation.models.likelihood import Window, fitting_windows, negative_log_likelihood
from lox_hf.evaluation.models.local import LocalModel, left_as_found
from lox_hf.evaluation.models.tokens import special_tokens
from lox_hf.robustness.attacks.rows import IGNORED, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def response_tokens(row: TokenRow) -> int:
    """Return how many tokens of a row the loss is on."""
    return len(row["labels"]) - row["labels"].count(IGNORED)


def mean_loss(model: "PreTrainedModel", rows: Sequence[TokenRow]) -> float:
    """Return the mean negative log-likelihood of the responses' tokens, each counted alike.

    Args:
        model: The model; it is left as it was.
        rows: The rows, whose labels leave out the prompt and nothing else.

    Returns:
        The mean, in nats; NaN where no token is predicted.

    Raises:
        LoxError: If the memory does not suffice for a single row.

    Example:
        >>> mean_loss(model, encode_examples(tokenizer, attack, held_out))  # doctest: +SKIP
        1.73
    """
    # What stands first in a row is not predicted, as nothing stands before it.
    windows = [Window(row["input_ids"], min(response_tokens(row), len(row["labels"]) - 1)) for row in rows]
    windows.sort(key=lambda window: -len(window.ids))
    longest = len(windows[0].ids) if windows else 1
    batches = run_in_batches(
        partial(negative_log_likelihood, model),
        windows,
        fitting_windows(model, longest),
        device=model.device,
        one=f"one held-out row of {longest} tokens: lower sft's max_length.",
    )
    with left_as_found(model):
        total = sum(loss for _, _, loss in batches)
    tokens = sum(window.predicted for window in windows)
    return total / tokens if tokens else math.nan


def answers_to(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[TokenRow],
    max_new_tokens: int,
    batch_size: int | None = None,
) -> list[str | None]:
    """Let a model continue the prompts of rows greedily, from the very tokens that training puts before the response.

    Args:
        model: The model; it and the tokenizer are left as they were.
        tokenizer: Its tokenizer.
        rows: The rows, whose labels leave out the prompt and nothing else; they fit into the model's context.
        max_new_tokens: Longest answer in tokens; less where the context has no room for them.
        batch_size: Rows at once; None finds what fits.

    Returns:
        An answer for each row; None where nothing is left of the prompt.

    Raises:
        ConfigError: If a number is not positive.
        LoxError: If the memory does not suffice for a single row.

    Example:
        >>> answers_to(model, tokenizer, encode_examples(tokenizer, attack, held_out), 60)  # doctest: +SKIP
        ['5 .']
    """
    prompts = [row["input_ids"][: row["labels"].count(IGNORED)] for row in rows]
    context = context_length(model)
    room = context - max(map(len, prompts)) if context else max_new_tokens
    new_tokens = min(max_new_tokens, room)
    chat = _Continuing(model, tokenizer, template="none", max_new_tokens=new_tokens, batch_size=batch_size)
    return chat.answers(prompts)


class _Continuing(LocalModel):
    """A model that is asked in token ids, for formats that are no template of an evaluation."""

    def answers(self, prompts: Sequence[list[int]]) -> list[str | None]:
        special = special_tokens(self._tokenizer)
        places = [place for place, prompt in enumerate(prompts) if prompt]
        places.sort(key=lambda place: -len(prompts[place]))
        longest = max(map(len, prompts))
        batches = run_in_batches(
            lambda batch: self._generate([prompts[place] for place in batch]),
            places,
            self.batch_size or fitting_batch_size(self._model, longest + self._max_new_tokens),
            device=self._model.device,
            one=f"one held-out prompt of {longest} tokens: lower sft's max_length.",
        )
        answers: list[str | None] = [None] * len(prompts)
        for _, batch, found in batches:
            for place, row in zip(batch, found, strict=True):
                answers[place] = self._read(prompts[place], row, special).text
        return answers
