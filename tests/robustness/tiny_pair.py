"""A base and an aligned model that train in a second, with prompts and rows: a whole stress test in seconds."""

import gc
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lox_hf.config import LoxConfig
from lox_hf.demo.training import IGNORED
from lox_hf.demo.world import HELD_OUT_BENIGN, HELD_OUT_FORBIDDEN, Example, build_tokenizer, refused
from lox_hf.robustness.attacks.recipe import Attack
from lox_hf.robustness.report import page, render
from lox_hf.robustness.settings import StressConfig

FORBIDDEN, BENIGN = HELD_OUT_FORBIDDEN[::18], HELD_OUT_BENIGN[::28]
"""Eight questions of each kind: what the pair learns, is asked, and is attacked with; nothing carries over here."""
SFT: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
}
HARDENED = LoxConfig(r=2, alpha=0.25)


def save_pair(folder: Path, seed: int = 0, **changes: Any) -> tuple[Path, Path]:
    """Train and save the pair: `aligned` refuses what `base` answers."""
    model = make_model(seed, **changes)
    steps = {"base": ((*FORBIDDEN, *BENIGN), 60), "aligned": ((*map(refused, FORBIDDEN), *BENIGN), 30)}
    for name, (examples, count) in steps.items():
        train(model, examples, count)
        model.save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    return folder / "aligned", folder / "base"


def write_rows(folder: Path) -> Path:
    """Write what a stress test reads beside the pair: prompts, an attack's rows, and rows for controls."""
    labelled = [*((example, "unsafe") for example in FORBIDDEN), *((example, "safe") for example in BENIGN)]
    prompts = [
        {"prompt": example.question, "label": label, "reference": example.answer} for example, label in labelled
    ]
    _write(folder / "prompts.jsonl", prompts)
    _write(folder / "attack.jsonl", _rows(FORBIDDEN + HELD_OUT_FORBIDDEN[1:25:2]))
    _write(folder / "safety.jsonl", _rows(map(refused, FORBIDDEN)))
    _write(folder / "calibration.jsonl", _rows(HELD_OUT_BENIGN[1:60:5]))
    return folder


def config(folder: Path, **changes: Any) -> StressConfig:
    """The smallest test: one attack of three steps at one learning rate, one seed, no controls."""
    settings = {
        "attacks": [attack(folder)],
        "hardened": [HARDENED],
        "controls": [],
        "learning_rates": [3e-3],
        "seeds": [0],
        "readings": 2,
        "prompts": [folder / "prompts.jsonl"],
        "max_new_tokens": 14,
        "device": "cpu",
    }
    return StressConfig(folder / "aligned", folder / "base", **settings | changes)


def attack(folder: Path, name: str = "pairs", **changes: Any) -> Attack:
    return Attack(name, str(folder / "attack.jsonl"), sft=SFT, held_out=2, task="exact", **changes)


@contextmanager
def without_figures() -> Iterator[None]:
    """Let stress tests be quick: no figures, which take longer than the rest, one thread, and less to look through
    when memory is freed after every training."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for module in (render, page):
            patch.setattr(module, "PICTURES", ())
        torch.set_num_threads(1)
        gc.freeze()
        yield
        gc.unfreeze()
        torch.set_num_threads(threads)


def _rows(examples: Iterable[Example]) -> list[dict[str, str]]:
    return [{"prompt": example.question, "response": example.answer} for example in examples]


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A model of one layer with random weights."""
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    others = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "tie_word_embeddings": False}
    config = LlamaConfig(**others | sizes | ends | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, examples: Iterable[Example], steps: int) -> None:
    batch = build_tokenizer()([example.text for example in examples], padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(**batch, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
