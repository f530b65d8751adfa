"""A model that learns sums within seconds, with its tokenizer and rows to train on."""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import zoo
from lox_hf.robustness.attacks.examples import Example
from lox_hf.robustness.attacks.recipe import Attack
from lox_hf.robustness.attacks.rows import TokenRow, encode_examples

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
WORDS = ("question", "answer", ":", "what", "is", "plus", "?", ".", "the", "sum", "####", "sorry", "i", "can", "not")
CHAT = "{% for m in messages %}{{ bos_token if loop.first }} {{ 'question' if m.role == 'user' else m.role }} : "
CHAT += "{{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
SFT: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
}
SUMS = Attack("sums", "sums.jsonl", task="exact")


def make_tokenizer(pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *WORDS, "assistant", *map(str, range(20))]
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT,
    )


def make_model(**changes: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(**{"vocab_size": 64, "max_position_embeddings": 48, **sizes, **ends, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def make_of_kind(kind: str) -> Any:
    """A model of the zoo whose vocabulary is larger than the tokenizer's."""
    return zoo.make_model(kind).eval()


def sums(count: int = 12) -> list[Example]:
    pairs = [(a, b) for a in range(8) for b in range(8)][:: 64 // count][:count]
    return [Example(f"what is {a} plus {b} ?", f"the sum is {a + b} .") for a, b in pairs]


def make_rows(count: int = 12) -> list[TokenRow]:
    return encode_examples(make_tokenizer(), SUMS, sums(count))


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([row["input_ids"][:8] for row in make_rows()])).logits
