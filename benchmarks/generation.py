"""Both sides of the generation figures: `LocalModel` against `generate` on one prompt at a time. Run as a child."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import run_job, serve_job

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

LARGEST_VOCABULARY = 4096
MOST_PROMPTS = 520
NEW_TOKENS = 60


def compare_generation(prompts: Path, threads: int, rounds: int, count: int = MOST_PROMPTS) -> dict[str, Any]:
    """Compare in a child process: tokens per second of both sides and whether their texts are equal.

    Args:
        prompts: CSV file with a column "goal".
        threads: Threads of both sides.
        rounds: How often all prompts are answered in batches; between them the other side answers its share.
        count: Take the first prompts only.
    """
    arguments = {"prompts": str(prompts), "rounds": rounds, "count": count}
    return run_job("generation.py", "compare", arguments, threads).result


def compare(prompts: str, rounds: int, count: int) -> dict[str, Any]:
    """Answer in turn: all prompts in batches, then every `rounds`-th one alone, so that both meet the same machine."""
    from lox_hf.evaluation.models.chat import ask
    from lox_hf.evaluation.models.local import LocalModel
    from lox_hf.evaluation.models.templates import encode

    with open(prompts, newline="", encoding="utf-8") as file:
        conversations = [ask(row["goal"]) for row in csv.DictReader(file)][:count]
    tokenizer = _tokenizer([turns[0]["content"] for turns in conversations])
    model = _model(len(tokenizer))
    encoded = [encode(tokenizer, turns, "alpaca") for turns in conversations]
    _alone(model, encoded[0])  # the first call pays for what is loaded late
    batched_s, alone_s, alone = [], 0.0, {}
    for turn in range(rounds):
        started = time.perf_counter()
        local = LocalModel(model, tokenizer, max_new_tokens=NEW_TOKENS)
        replies = dict(local.replies(conversations))
        batched_s.append(time.perf_counter() - started)
        started = time.perf_counter()
        alone |= {number: _alone(model, encoded[number]) for number in range(turn, len(encoded), rounds)}
        alone_s += time.perf_counter() - started
    texts = {number: tokenizer.decode(ids, skip_special_tokens=True).strip() for number, ids in alone.items()}
    return {
        "prompts": len(conversations),
        "batch_size": local.batch_size,
        "batched_s": batched_s,
        "alone_s": alone_s,
        # Neither the model nor the tokenizer has an end token, so every answer has all its tokens.
        "tokens": sum(map(len, alone.values())),
        "cut_off": sum(reply.cut_off for reply in replies.values()),
        "equal_texts": sum(replies[number].text == text for number, text in texts.items()),
        "distinct_texts": len(set(texts.values())),
    }


def _alone(model: LlamaForCausalLM, prompt: list[int]) -> list[int]:
    """Generate as one does without batches: the prompt's ids into `generate`, greedily."""
    import torch

    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS)
    return output[0, len(prompt) :].tolist()


def _model(vocabulary: int) -> LlamaForCausalLM:
    """Build a model of 4 layers, 256 wide, in float32; its random weights are large, so that its answers differ."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the prompts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=LARGEST_VOCABULARY, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


if __name__ == "__main__":
    serve_job({"compare": compare})
