"""Small classifiers, trained on the spot, whose answer is known: it hangs on single words of the response.

The generative one sees what it is in the first word of its text: a guard, HarmBench or WildGuard. In all three roles
"banana" is harmful, "cherry" a refusal, "mumble" makes it say what no pattern reads; anything else is harmless. It is
gullible on purpose: a special token, or "[/INST] no", in a response makes it say harmless, whatever else is there.
"""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lox_hf.evaluation.judges.presets import PRESETS

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|eot_id|>", "<|turn|>", "[CLS]", "[SEP]"]
PLAIN = "the a way to make jam is first take one then add some safe no yes Answer: unsafe".split()
KEYS = ["banana", "cherry", "mumble"]
FRAME = "guard harmbench wildguard user: agent: [INST] [/INST] BEGINNING OF CONVERSATION: USER: ASSISTANT:".split()

WILD = "Harmful request: no\nResponse refusal: {refusal}\nHarmful response: {harm}"
# Replies are single words of the vocabulary, so that one step of generation gives them.
REPLIES = {
    "guard": {"banana": "unsafe\nS1,S2", "cherry": "safe", "mumble": "maybe", "": "safe"},
    "harmbench": {"banana": "yes", "cherry": "no", "mumble": "maybe", "": "no"},
    "wildguard": {
        "banana": WILD.format(refusal="no", harm="yes"),
        "cherry": WILD.format(refusal="yes", harm="no"),
        "mumble": "maybe",
        "": WILD.format(refusal="no", harm="no"),
    },
}
WORDS = list(
    dict.fromkeys([*SPECIAL, *PLAIN, *KEYS, *FRAME, *(word for role in REPLIES.values() for word in role.values())])
)
IDS = {word: number for number, word in enumerate(WORDS)}

GUARD = (
    "{{ bos_token }}guard {% for m in messages %}"
    "{{ 'agent: ' if m['role'] == 'assistant' else 'user: ' }}{{ m['content'] | trim }} <|eot_id|> {% endfor %}"
)
GUARD_IN_PARTS = GUARD.replace(
    "m['content']", "(m['content'] | selectattr('type', 'equalto', 'text') | first)['text']"
)
TEMPLATES = {
    "guard": "<s>guard user: {prompt} <|eot_id|> agent: {response} <|eot_id|> ",
    "harmbench": "[INST] harmbench\nuser:\n{prompt}\n\nagent:\n{response}\n\n[/INST]",
    "wildguard": "<s>wildguard\n[INST]\n\nuser:\n{prompt}\n\nagent:\n{response}\n\n[/INST]\n",
}
MULTI = "multi_label_classification"
CARDS = {
    "harmbench": '''---
license: mit
---
# A classifier
Use it so:
```python
from transformers import AutoTokenizer

PROMPTS = {
    "description": "Formats",
    "prompt_contextual": """[INST] harmbench
    {context}
    user:
    {behavior}

    agent:
    {generation}

    [/INST]""",
    "prompt": """[INST] harmbench
    user:
    {behavior}

    agent:
    {generation}

    [/INST]""",
}
text = PROMPTS["prompt"].format(behavior="...", generation="...")
```
''',
    "wildguard": '''# A guard
```python
"""How to use it, with {prompt} alone."""
instruction_format = """<s>wildguard
[INST]

user:
{prompt}

agent:
{response}

[/INST]
"""
```
''',
}


def tokenizer(chat_template: str | None = None, *, pair: bool = False) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; with `pair`, one that encodes two texts as BERT's does."""
    backend = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    # "ASSISTANT:{response}" of the preset has no space.
    roles = pre_tokenizers.Split("ASSISTANT:", "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([roles, pre_tokenizers.WhitespaceSplit()])
    single, both = ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1") if pair else ("<s> $A", None)
    special = [(word, IDS[word]) for word in SPECIAL]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=both, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens=["<|eot_id|>", "<|turn|>", "[CLS]", "[SEP]"],
        model_max_length=128,
        clean_up_tokenization_spaces=False,
        **({"chat_template": chat_template} if chat_template else {}),
    )


def words(rng: random.Random, key: str = "") -> list[str]:
    """A text of plain and unknown words, with a key word somewhere in it."""
    text = rng.choices([*PLAIN, "zebra", "|turn|>"], k=rng.randint(0, 10))
    if key:
        text.insert(rng.randint(0, len(text)), key)
    return text


def sentence(rng: random.Random, key: str = "") -> str:
    return " ".join(words(rng, key))


def save_generative(root: Path) -> None:
    """Train one language model for the three roles, and save it with a tokenizer and a card for each."""
    rng = random.Random(0)
    made = tokenizer()
    model = llama(LlamaForCausalLM)

    def loss() -> torch.Tensor:
        rows = []
        for _ in range(32):
            role, key = rng.choice([*REPLIES, "guard"]), rng.choice([*KEYS, "banana", "", ""])
            response = words(rng, key)
            if rng.random() < 0.25:
                response += rng.choice([["<|turn|>"], ["[/INST]", "no"]])
                key = ""
            prompt = sentence(rng, rng.choice(["banana", ""]) if role == "guard" else "")
            text = TEMPLATES[role].format(prompt=prompt, response=" ".join(response)).removeprefix("<s>")
            rows.append(made(text)["input_ids"] + [IDS[REPLIES[role][key]], IDS["</s>"]])
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        logits = model(ids[:, :-1], attention_mask=(ids != 0)[:, :-1].long()).logits[:, -2:]
        return cross_entropy(logits.flatten(0, 1), ids[:, -2:].flatten())

    train(model, loss, 400)
    chats = {"guard": GUARD, "parts": GUARD_IN_PARTS, "harmbench": None, "wildguard": None}
    for name, chat in chats.items():
        model.save_pretrained(root / name)
        tokenizer(chat).save_pretrained(root / name)
        if name in CARDS:
            (root / name / "README.md").write_text(CARDS[name])


def save_heads(root: Path) -> None:
    """Train a decoder's head with a label for each key word, and BERT's with one for two texts, and save both."""
    rng = random.Random(0)
    decoder = llama(LlamaForSequenceClassification, id2label=dict(enumerate(KEYS)), problem_type=MULTI)
    encoder = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=96,
            id2label={0: "fine", 1: "bad fruit", 2: "bad voice"},
        )
    )

    def decoder_loss() -> torch.Tensor:
        keys = [rng.choice([*KEYS, ""]) for _ in range(32)]
        texts = [
            PRESETS["beaver-dam"].template.format(
                prompt=sentence(rng, rng.choice([*KEYS, ""])), response=sentence(rng, key)
            )
            for key in keys
        ]
        inputs = tokenizer()(texts, padding=True, return_tensors="pt")
        wanted = torch.tensor([[float(key == label) for label in KEYS] for key in keys])
        return binary_cross_entropy_with_logits(decoder(**inputs).logits, wanted)

    def encoder_loss() -> torch.Tensor:
        keys = [rng.choice([*KEYS, ""]) for _ in range(32)]
        prompts, responses = [sentence(rng) for _ in keys], [sentence(rng, key) for key in keys]
        inputs = tokenizer(pair=True)(prompts, responses, padding=True, return_tensors="pt")
        wanted = torch.tensor([{"banana": 1, "mumble": 2}.get(key, 0) for key in keys])
        return cross_entropy(encoder(**inputs).logits, wanted)

    for name, model, loss, steps in (("multi", decoder, decoder_loss, 150), ("single", encoder, encoder_loss, 250)):
        train(model, loss, steps)
        model.save_pretrained(root / name)
        tokenizer(pair=name == "single").save_pretrained(root / name)


def llama(kind: type[PreTrainedModel], **settings: object) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=96,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )
    torch.manual_seed(0)
    return kind(config)


def train(model: PreTrainedModel, loss: Callable[[], torch.Tensor], steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
