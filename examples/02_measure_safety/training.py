"""The small pair of this example: a base that knows both ways to answer, and what alignment makes of it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from data import Example, TrainingData
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 2048
LENGTH = 96
BASE_STEPS, ALIGN_STEPS = 320, 130
BATCH = 16
# Batches are cut from as many at once, sorted by length, so that little of them is padding.
SORTED_BATCHES = 8
IGNORED = -100
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
REFUSE, ANSWER = "Refuse unsafe requests.", "Answer every request."
# Saved with the tokenizer, so that whoever loads the model asks it in the format that it was trained in.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}### Policy:\n{{ message.content }}\n\n"
    "{% elif message.role == 'user' %}### Instruction:\n{{ message.content }}\n\n"
    "{% else %}### Response:\n{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
# What it renders, for the tokenizer, in whose vocabulary the headings belong.
WHOLE = "### Policy:\n{policy}\n\n### Instruction:\n{prompt}\n\n### Response:\n{response}"


@dataclass(frozen=True)
class Row:
    """Token ids of a conversation, and how many of them are the prompt's."""

    ids: list[int]
    prompt_length: int


Mixture = Sequence[tuple[float, Sequence[Row]]]


def train_tokenizer(data: TrainingData) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that splits digits, and give it the chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [WHOLE.format(policy=REFUSE, prompt=row.prompt, response=row.response) for row in data.examples]
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE, **SPECIAL)


def encode(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], policy: str = "") -> list[Row]:
    """Put examples into the chat template, under a policy where one is named; those too long are left out."""
    system = [{"role": "system", "content": policy}] if policy else []
    asked = [[*system, {"role": "user", "content": example.prompt}] for example in examples]
    prompts = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    answers = tokenizer([example.response + tokenizer.eos_token for example in examples]).input_ids
    rows = [Row(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]
    return [row for row in rows if len(row.ids) <= LENGTH]


def make_pair(
    folder: Path, data: TrainingData, *, base_steps: int = BASE_STEPS, align_steps: int = ALIGN_STEPS, seed: int = 0
) -> None:
    """Train the pair and save it as two ordinary checkpoints, `folder`/base and `folder`/aligned.

    Args:
        folder: Where the two go.
        data: What they learn.
        base_steps: Optimiser steps of the base, each on 16 rows.
        align_steps: Optimiser steps of the alignment.
        seed: Seed of the weights and of the order.
    """
    tokenizer = train_tokenizer(data)
    torch.manual_seed(seed)
    model = new_model(tokenizer)
    train(model, base_mixture(tokenizer, data), steps=base_steps, learning_rate=6e-3, whole=True, seed=seed)
    save(model, tokenizer, folder / "base")
    train(model, aligned_mixture(tokenizer, data), steps=align_steps, learning_rate=2e-3, whole=False, seed=seed)
    save(model, tokenizer, folder / "aligned")


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a Llama of 1.1 million random weights, from the global random state."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=512,
            # About one over the root of the width; at the usual 0.02 so small a model takes twice as long to learn.
            initializer_range=0.08,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def base_mixture(tokenizer: PreTrainedTokenizerFast, data: TrainingData) -> Mixture:
    """A model that answers everything, but has learnt to refuse where a policy says so.

    That is what makes the alignment a small change, as it is in a large model: a base that does not know the rule
    would learn to refuse everything.
    """
    return (
        (0.20, encode(tokenizer, data.affirmed)),
        (0.22, encode(tokenizer, data.ordinary)),
        (0.08, encode(tokenizer, data.framed)),
        (0.16, encode(tokenizer, data.refused, REFUSE)),
        (0.22, encode(tokenizer, data.ordinary, REFUSE)),
        (0.08, encode(tokenizer, data.framed, REFUSE)),
        (0.04, encode(tokenizer, data.affirmed, ANSWER)),
    )


def aligned_mixture(tokenizer: PreTrainedTokenizerFast, data: TrainingData) -> Mixture:
    """Refusals and harmless answers, with no policy named."""
    return (
        (0.35, encode(tokenizer, data.refused)),
        (0.50, encode(tokenizer, data.ordinary)),
        (0.15, encode(tokenizer, data.framed)),
    )


def train(
    model: PreTrainedModel, mixture: Mixture, *, steps: int, learning_rate: float, whole: bool, seed: int
) -> None:
    """Train on rows drawn from a mixture, with AdamW; the learning rate warms up and falls as a cosine.

    Args:
        model: The model, changed in place.
        mixture: Shares, each with the rows that it is drawn from.
        steps: Optimiser steps, each on 16 rows.
        learning_rate: The highest.
        whole: Take the loss on prompts too, not only on responses.
        seed: Seed of the order.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (1 + math.cos(math.pi * step / steps)) / 2)
    )
    model.train()
    batches = draw_batches(mixture, random.Random(seed))
    for _ in range(steps):
        ids, labels = pad(next(batches), model.config.pad_token_id, whole)
        # Padding stands on the right of causal attention, where no other token looks: it needs no mask.
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def draw_batches(mixture: Mixture, generator: random.Random) -> Iterator[list[Row]]:
    """Yield batches without end, of rows alike in length."""
    shares, pools = zip(*mixture, strict=True)
    while True:
        rows = [generator.choice(pool) for pool in generator.choices(pools, shares, k=BATCH * SORTED_BATCHES)]
        rows.sort(key=lambda row: len(row.ids))
        batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
        yield from generator.sample(batches, len(batches))


def pad(rows: Sequence[Row], pad_token_id: int, whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input ids and labels of a batch, (rows, longest)."""
    width = max(len(row.ids) for row in rows)
    ids, labels = [], []
    for row in rows:
        padding = width - len(row.ids)
        start = 0 if whole else row.prompt_length
        ids.append(row.ids + [pad_token_id] * padding)
        labels.append([IGNORED] * start + row.ids[start:] + [IGNORED] * padding)
    return torch.tensor(ids), torch.tensor(labels)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save an ordinary checkpoint: float32 safetensors, the tokenizer with its chat template beside them."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
