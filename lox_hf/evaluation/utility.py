"""Measure usefulness: accuracy on GSM8K as the paper's reference does, and perplexity on any text."""

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lox_hf.errors import ConfigError, PromptError, listing
from lox_hf.evaluation.answering import answer, as_chat_model
from lox_hf.evaluation.data.gsm8k import (
    PROMPT,
    Question,
    last_number,
    load_questions,
    number_after_marker,
    questions_hash,
)
from lox_hf.evaluation.data.tables import TEXT, read_rows
from lox_hf.evaluation.models.batch_size import run_in_batches
from lox_hf.evaluation.models.chat import ChatModel, Reply, ask
from lox_hf.evaluation.models.checks import check_model, check_vocabulary, context_length, model_name
from lox_hf.evaluation.models.likelihood import fitting_windows, negative_log_likelihood, split
from lox_hf.evaluation.models.loading import quiet_transformers
from lox_hf.evaluation.models.local import left_as_found
from lox_hf.evaluation.models.templates import encode, special_tokens
from lox_hf.progress import progress_bar
from lox_hf.records import AccuracyReport, ModelReference, PerplexityReport
from lox_hf.run_folder import RunFolder
from lox_hf.statistics import rate
from lox_hf.version import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ACCURACY_REPORT_NAME = "report.json"
GSM8K_NEW_TOKENS = 400
LONGEST_WINDOW = 2048
"""Tokens that are read at once where a model could read more: its memory grows with them."""


def gsm8k_accuracy(
    model: "PreTrainedModel | ChatModel",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    questions: str | Path = "gsm8k",
    *,
    chat: bool = False,
    max_new_tokens: int | None = None,
    n: int | None = None,
    batch_size: int | None = None,
    output_dir: str | Path | None = None,
    progressbar: bool | None = None,
) -> AccuracyReport:
    """Let a model answer grade-school mathematics greedily, and count the right numbers.

    As in the reference the question stands in Alpaca's format, and the number behind the last "####" counts; with
    `chat` the question goes through the chat template, and the last number counts. The reference puts a second BOS in
    front, and gives up on numbers that are not bare; see `number_after_marker` and `last_number`. With `output_dir`
    every answer is on disk as soon as it is there, and a killed run goes on where it was.

    Args:
        model: A loaded model, or a `ChatModel`. An `Endpoint` puts its chat template around whatever it is asked, so
            `chat` is what it is for.
        tokenizer: The model's tokenizer; None for a `ChatModel`.
        questions: "gsm8k" for the 1319 test questions from the Hub, or a file with the columns question and answer.
        chat: Ask as in a chat.
        max_new_tokens: Longest answer in tokens; None takes the reference's 400. This and `batch_size` are a loaded
            model's; a `ChatModel` has its own.
        n: The first n questions only; None takes all.
        batch_size: Questions at once; None finds what fits.
        output_dir: Folder for `generations.jsonl` and `report.json`; None keeps everything in memory.
        progressbar: Show a progress bar; None shows it on a terminal only.

    Returns:
        The report. A question that an endpoint did not answer is unscored; the next run asks it again.

    Raises:
        ConfigError: If a setting is out of range, or there is no chat template where one is asked for.
        PromptError: If the questions cannot be read.
        OutputError: If the folder holds another run, or cannot be written.
        EndpointError: If an endpoint cannot be used; what was answered is kept.
        UnsupportedModelError: If the model cannot generate from a prompt, such as an encoder-decoder.

    Example:
        >>> report = gsm8k_accuracy(model, tokenizer, n=200)  # doctest: +SKIP
        >>> print(report.accuracy)  # doctest: +SKIP
        36.5 % [30.1, 43.4] of 200

    Source: Perin et al., COLM 2025, section 4; the reference's fine-tuning-attacks/acc_gsm.py.
    """
    given = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    if tokenizer is not None:  # a loaded model; the prompt is the whole format
        given |= {"template": "chat" if chat else "none", "max_new_tokens": max_new_tokens or GSM8K_NEW_TOKENS}
    answering = as_chat_model(model, tokenizer, **given)
    asked = load_questions(questions, n)
    sha256 = questions_hash(asked)
    generation = answering.settings() | {"prompt": None if chat else PROMPT}
    settings = {"questions": f"{len(asked)}, sha256 {sha256[:16]}", **generation}
    if "weights_sample" not in generation:
        settings["model"] = answering.name
    with RunFolder(output_dir, settings) as run:
        conversations = [ask(item.text if chat else PROMPT.format(question=item.text)) for item in asked]
        about = [{"question": item.text, "number": item.number} for item in asked]
        replies = answer(run, answering, conversations, about, progressbar)
        report = _accuracy(
            asked,
            replies,
            chat,
            model=ModelReference(answering.name, generation.pop("revision", None)),
            questions={"name": str(questions), "n": len(asked), "sha256": sha256},
            generation={name: value for name, value in generation.items() if name != "weights_sample"},
        )
        run.write(ACCURACY_REPORT_NAME, report.to_json())
    return report


def perplexity(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str] | str | Path,
    *,
    max_length: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    progressbar: bool | None = None,
) -> PerplexityReport:
    """Return the perplexity of texts: exp(-1/T sum_t log p(x_t | x_<t)) over all T tokens of all texts.

    Every text begins with one BOS where the tokenizer uses one; without it the first token, which nothing stands
    before, is not predicted. A text longer than `max_length` is read in windows that begin `stride` tokens apart, and
    each token is predicted once, in the first window that has it. Losses are float32, their sum float64. The model and
    the tokenizer are left as they were found.

    Args:
        model: A loaded causal language model, on the device it is on.
        tokenizer: Its tokenizer.
        texts: The texts, or a file of them as `load_texts` reads it.
        max_length: Tokens of a window; None takes what the model is made for, 2048 at most.
        stride: Tokens from one window to the next, below `max_length`; None takes half of it.
        batch_size: Windows at once; None takes what keeps the logits under 1 GiB, 64 at most.
        progressbar: Show a progress bar; None shows it on a terminal only.

    Returns:
        The report; with a warning and NaN where no token was predicted.

    Raises:
        ConfigError: If a setting is out of range, or the tokenizer is missing or not the model's.
        PromptError: If the file cannot be read, or there are no texts.
        UnsupportedModelError: If the model does not predict the next token.
        LoxError: If the memory does not suffice for a single window.

    Example:
        >>> report = perplexity(model, tokenizer, "held_out.jsonl")  # doctest: +SKIP
        >>> round(report.perplexity, 2)  # doctest: +SKIP
        6.84

    Source: "Perplexity of fixed-length models" in the documentation of transformers.
    """
    texts = load_texts(texts) if isinstance(texts, str | Path) else list(texts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise PromptError("Expected texts to measure: a list with at least one, or a file of them.")
    check_model(model, tokenizer)
    length, step = _window_settings(model, max_length, stride, batch_size)
    with quiet_transformers():  # it warns of texts that are longer than the model reads at once
        special = special_tokens(tokenizer)
        sequences = [encode(tokenizer, ask(text), "none", special=special) for text in texts]
    check_vocabulary(model, tokenizer, sequences)
    windows = [window for ids in sequences for window in split(ids, length, step)]
    windows.sort(key=lambda window: -len(window.ids))
    longest = max((len(window.ids) for window in windows), default=1)
    batches = run_in_batches(
        partial(negative_log_likelihood, model),
        windows,
        batch_size or fitting_windows(model, longest),
        device=model.device,
        one=f"one window of {longest} tokens: lower max_length, or load the model in a smaller dtype.",
    )
    total, tokens = 0.0, sum(window.predicted for window in windows)
    with left_as_found(model), progress_bar(tokens, progressbar, "Perplexity", unit="token") as advance:
        for _, batch, loss in batches:
            total += loss
            advance(sum(window.predicted for window in batch))
    if not tokens:
        warnings.warn("No token was predicted, so the perplexity is not known (NaN).", stacklevel=2)
    mean = total / tokens if tokens else math.nan
    return PerplexityReport(
        perplexity=torch.tensor(mean, dtype=torch.float64).exp().item(),
        tokens=tokens,
        texts=len(texts),
        sha256=hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        max_length=length,
        stride=step,
        dtype=str(model.dtype).removeprefix("torch."),
        model=ModelReference(model_name(model), getattr(model.config, "_commit_hash", None)),
        versions=versions("transformers"),
    )


def load_texts(path: str | Path) -> list[str]:
    """Load texts from a file: each line of a .txt, or the column text of a table.

    For one long text, whose lines belong together, pass `[Path(path).read_text()]` to `perplexity`.

    Args:
        path: The file, of any kind that `lox_hf.evaluation.data.tables.read_rows` reads.

    Returns:
        The texts in their order.

    Raises:
        PromptError: If the file cannot be read, or holds no texts.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "texts.jsonl"
        >>> _ = path.write_text('{"text": "The cat sat on the mat."}')
        >>> load_texts(path)
        ['The cat sat on the mat.']
    """
    texts = [row.get(TEXT) for row in read_rows(path, (TEXT,))]
    wrong = [f"row {place}" for place, text in enumerate(texts, 1) if not isinstance(text, str)]
    if wrong or not texts:
        what = f"{len(wrong)} of {len(texts)} rows have none: {listing(wrong, 5)}" if wrong else "there are no rows."
        raise PromptError(f"'{path}': expected texts in the column '{TEXT}'; {what}")
    return [str(text) for text in texts]


def _accuracy(asked: Sequence[Question], replies: Sequence[Reply], chat: bool, **about: Any) -> AccuracyReport:
    read = last_number if chat else number_after_marker
    numbers = [read(reply.text) for reply in replies]
    right = tuple(number == question.number for number, question in zip(numbers, asked, strict=True))
    unanswered = sum(reply.transient for reply in replies)
    return AccuracyReport(
        accuracy=rate(sum(right), len(right) - unanswered, unanswered),
        unreadable=sum(number is None for number in numbers) - unanswered,
        right=right,
        versions=versions("scipy", "transformers"),
        **about,
    )


def _window_settings(
    model: "PreTrainedModel", max_length: int | None, stride: int | None, batch_size: int | None
) -> tuple[int, int]:
    """Tokens of a window, and from one to the next."""
    context = context_length(model)
    length = min(context or LONGEST_WINDOW, LONGEST_WINDOW) if max_length is None else max_length
    step = length // 2 if stride is None else stride
    problems = []
    if length < 2 or length > (context or length):
        problems.append(f"max_length is {length}, expected 2 to {context or 'any number'}")
    if not 1 <= step < length:
        problems.append(f"stride is {step}, expected 1 to {length - 1}, so that every token has one before it")
    if batch_size is not None and batch_size < 1:
        problems.append(f"batch_size is {batch_size}, expected at least 1")
    if problems:
        raise ConfigError(f"Cannot measure perplexity: {'; '.join(problems)}.")
    return length, step
