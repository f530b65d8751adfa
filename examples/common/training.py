"""Train the small pair: a base that knows both ways to answer, and what alignment makes of it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from common.data import Example, TrainingData
from common.recipe import REFUSE, Phase, Recipe

VOCABULARY = 2048
LENGTH = 96
# Batches are cut from as many at once, sorted by length, so that little of them is padding.
SORTED_BATCHES = 8
IGNORED = -100
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
# Saved with the tokenizer, so that whoever loads the model asks it in the format that it was trained in.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}### Policy:\n{{ message.content }}\n\n"
    "{% elif message.role == 'user' %}### Instruction:\n{{ message.content }}\n\n"
    "{% else %}### Response:\n{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
# What it renders, but for the special tokens.
POLICY = "### Policy:\n{policy}\n\n"
TURNS = "### Instruction:\n{prompt}\n\n### Response:\n{response}"


@dataclass(frozen=True)
class Row:
    """Token ids of a conversation, and how many of them are the prompt's."""

    ids: list[int]
    prompt_length: int


Mixture = Sequence[tuple[float, Sequence[Row]]]


def make_pair(folder: Path, data: TrainingData, recipe: Recipe, *, seed: int = 0) -> None:
    """Train the pair and save it as two ordinary checkpoints, `folder`/base and `folder`/aligned.

    Args:
        folder: Where the two go.
        data: What they learn.
        recipe: How they learn it.
        seed: Seed of the weights and of the order.
    """
    tokenizer = train_tokenizer(data)
    torch.manual_seed(seed)
    model = new_model(tokenizer, recipe)
    for name, phase in (("base", recipe.base), ("aligned", recipe.alignment)):
        rows = [(part.share, encode(tokenizer, getattr(data, part.kind), part.policy)) for part in phase.parts]
        train(model, rows, phase, batch=recipe.batch, seed=seed)
        save(model, tokenizer, folder / name)


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
    # All headings belong in the vocabulary.
    texts = [POLICY.format(policy=REFUSE) + render(example) for example in data.examples]
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE, **SPECIAL)


def render(example: Example) -> str:
    """Return an example as the text that is trained on."""
    return TURNS.format(prompt=example.prompt, response=example.response)


def new_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """Return a Llama of random weights, 1.1 million with three layers, from the global random state."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=recipe.layers,
            num_attention_heads=4,
            max_position_embeddings=512,
            initializer_range=recipe.initializer_range,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], policy: str = "") -> list[Row]:
    """Put examples into the chat template, under a policy where one is named; those too long are left out."""
    system = [{"role": "system", "content": policy}] if policy else []
    asked = [[*system, {"role": "user", "content": example.prompt}] for example in examples]
    prompts = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    answers = tokenizer([example.response + tokenizer.eos_token for example in examples]).input_ids
    rows = [Row(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]
    return [row for row in rows if len(row.ids) <= LENGTH]


def train(model: PreTrainedModel, mixture: Mixture, phase: Phase, *, batch: int, seed: int) -> None:
    """Train on rows drawn from a mixture, with AdamW.

    Args:
        model: The model, changed in place.
        mixture: Shares, each with the rows that it is drawn from.
        phase: Steps, learning rate and loss.
        batch: Rows of a step.
        seed: Seed of the order.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    steps, warmup = phase.steps, max(1, phase.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (1 + math.cos(math.pi * step / steps)) / 2)
    )
    model.train()
    batches = draw_batches(mixture, batch, random.Random(seed))
    for _ in range(steps):
        ids, labels = pad(next(batches), model.config.pad_token_id, phase.whole)
        # Padding stands on the right of causal attention, where no other token looks: it needs no mask.
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def draw_batches(mixture: Mixture, size: int, generator: random.Random) -> Iterator[list[Row]]:
    """Yield batches without end, of rows alike in length."""
    shares, pools = zip(*mixture, strict=True)
    while True:
        rows = [generator.choice(pool) for pool in generator.choices(pools, shares, k=size * SORTED_BATCHES)]
        rows.sort(key=lambda row: len(row.ids))
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
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
