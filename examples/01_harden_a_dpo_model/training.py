"""The small pair of this example: a language model of HH-RLHF's dialogues, and what DPO makes of it."""

from __future__ import annotations

from pathlib import Path

import torch
from preferences import Preference
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 1024
BLOCK = 128
SHARD_SIZE = "100KB"
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, to which no text is unknown."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def train_base(tokenizer: PreTrainedTokenizerFast, texts: list[str], *, steps: int, seed: int) -> PreTrainedModel:
    """Train a small Llama from scratch on the dialogues: the model before alignment.

    Args:
        tokenizer: Its tokenizer.
        texts: Whole dialogues.
        steps: Optimiser steps, each on 16 blocks of 128 tokens.
        seed: Seed of the weights and of the order.

    Returns:
        The trained model, in float32.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    stream = [token for ids in tokenizer(texts).input_ids for token in [*ids, tokenizer.eos_token_id]]
    blocks = torch.tensor(stream[: len(stream) // BLOCK * BLOCK]).view(-1, BLOCK)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in range(steps):
        batch = blocks[torch.randint(len(blocks), (16,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def align(base: Path, pairs: list[Preference], output: Path, *, steps: int, learning_rate: float, seed: int) -> None:
    """Align the model in `base` by TRL's DPOTrainer and save it, in bfloat16 and in several shards.

    Args:
        base: Folder of the model to start from, which is DPO's reference too.
        pairs: Preference pairs.
        output: Folder for the aligned model.
        steps: Optimiser steps, each on 8 pairs.
        learning_rate: Peak learning rate. Too small a one is lost when the weights are rounded to bfloat16.
        seed: Seed of the order.
    """
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoTokenizer, PrinterCallback
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    # Given as a folder, the trainer loads policy and reference from the same files.
    trainer = DPOTrainer(
        model=str(base),
        args=DPOConfig(
            output_dir=str(output),
            model_init_kwargs={"dtype": "float32"},
            beta=0.1,
            learning_rate=learning_rate,
            max_steps=steps,
            per_device_train_batch_size=8,
            max_length=None,
            lr_scheduler_type="linear",
            warmup_steps=max(1, steps // 10),
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        ),
        train_dataset=Dataset.from_list([vars(pair) for pair in pairs]),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    save(trainer.model, trainer.processing_class, output)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a model as users do: bfloat16, safetensors, several shards, the tokenizer beside them."""
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(folder)


def load(name_or_path: str | Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """Load a model for measuring."""
    return AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype).eval()
