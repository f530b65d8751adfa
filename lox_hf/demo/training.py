"""The small pair, trained on the spot: a base model that answers everything, and the aligned model made from it."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lox_hf.demo.world import Example, alignment_example, base_example

IGNORED = -100
"""The label that the loss of transformers leaves out."""
CLIP_NORM = 1.0

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the steps that are done, and the steps in all."""


@dataclass(frozen=True)
class Recipe:
    """How the pair is trained; the defaults are what the demonstration's numbers belong to."""

    base_steps: int = 600
    base_lr: float = 3e-3
    base_warmup: int = 50
    alignment_steps: int = 80
    alignment_lr: float = 2e-4
    batch_size: int = 32


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: these matrices are too small to share, and results then do not depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return a freshly initialised Llama of about 0.4 M parameters; the global random state is left as it was."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train_base(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    recipe: Recipe,
    progress: Progress | None = None,
) -> None:
    """Pretrain a fresh model in place on the base corpus: loss on every word, warm-up and cosine decay."""
    rng = Random(f"base {seed}")
    shares = [_warmup_cosine(step, recipe.base_warmup, recipe.base_steps) for step in range(recipe.base_steps)]
    rates = [recipe.base_lr * share for share in shares]

    def draw() -> dict[str, Tensor]:
        rows = [base_example(rng) for _ in range(recipe.batch_size)]
        return encode(rows, tokenizer, answers_only=False)

    _fit(model, draw, rates, "training the base", progress)


def align(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    recipe: Recipe,
    progress: Progress | None = None,
) -> None:
    """Align a base model in place by supervised fine-tuning: loss on the answers, constant learning rate."""
    rng = Random(f"alignment {seed}")

    def draw() -> dict[str, Tensor]:
        rows = [alignment_example(rng) for _ in range(recipe.batch_size)]
        return encode(rows, tokenizer, answers_only=True)

    _fit(model, draw, [recipe.alignment_lr] * recipe.alignment_steps, "aligning", progress)


def encode(rows: list[Example], tokenizer: PreTrainedTokenizerFast, *, answers_only: bool) -> dict[str, Tensor]:
    """Turn rows into a batch, padded on the right.

    Args:
        rows: The examples.
        tokenizer: The world's tokenizer.
        answers_only: Leave the prompts out of the loss.

    Returns:
        input_ids, attention_mask and labels, each int64 (rows, longest row).
    """
    batch = tokenizer([row.text for row in rows], padding=True, padding_side="right", return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = ids.masked_fill(mask == 0, IGNORED)
    if answers_only:
        # Every word is one token, so a prompt's tokens are the first of its row.
        for label, prompt in zip(labels, tokenizer([row.prompt for row in rows])["input_ids"], strict=True):
            label[: len(prompt)] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _fit(
    model: LlamaForCausalLM,
    draw: Callable[[], dict[str, Tensor]],
    rates: list[float],
    label: str,
    progress: Progress | None,
) -> None:
    """Take one AdamW step for each learning rate, then put the model back in evaluation mode."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    model.train()
    for done, rate in enumerate(rates, start=1):
        for group in optimizer.param_groups:
            group["lr"] = rate
        model(**draw()).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if progress is not None:
            progress(label, done, len(rates))
    model.eval()


def _warmup_cosine(step: int, warmup: int, steps: int) -> float:
    """Return the share of the learning rate at a step: linear up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
