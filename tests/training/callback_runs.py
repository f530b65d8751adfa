"""Small trainings under a `LoxCallback`: a pair of models with their directions, and trainers of every kind."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, LlamaForCausalLM, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from lox_hf import LoxCallback, LoxConfig, SafetySubspace
from robustness.trainable import make_model, make_rows, make_tokenizer, sums

CONFIG = LoxConfig(r=2, target_modules="all-linear")
SETTINGS: dict[str, Any] = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "seed": 0,
}
KINDS = ("trainer", "sft", "dpo")


@cache
def _base_weights() -> dict[str, torch.Tensor]:
    model, tokenizer = make_model(), make_tokenizer()
    batch = tokenizer.pad({"input_ids": [row["input_ids"] for row in make_rows()]}, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(12):
        model(**batch, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.state_dict()


def make_base() -> LlamaForCausalLM:
    """The model before alignment knew sums, so that training on sums leads back to it: retention falls."""
    base = make_model()
    base.load_state_dict(_base_weights())
    return base


def make_subspace() -> SafetySubspace:
    return SafetySubspace.from_models(make_model(), make_base(), CONFIG, progressbar=False)


def make_trainer(folder: Path, kind: str = "sft", model: Any = None, callbacks: Any = (), **changes: Any) -> Any:
    """A trainer as one uses it; `changes` are settings of its config or, where they are `with_*`, of the trainer."""
    extra = {name.removeprefix("with_"): changes.pop(name) for name in list(changes) if name.startswith("with_")}
    settings = {**SETTINGS, "output_dir": str(folder), **changes}
    model = make_model() if model is None else model
    tokenizer = make_tokenizer()
    if kind == "dpo":
        extra = {"ref_model": None if extra.get("peft_config") else make_model(), **extra}
        args, rows = DPOConfig(**settings), preferences()
        data = {"train_dataset": rows, "eval_dataset": rows}
        return DPOTrainer(model, args=args, processing_class=tokenizer, callbacks=list(callbacks), **data, **extra)
    rows = Dataset.from_list([dict(row) for row in make_rows()])
    data = {"train_dataset": rows, "eval_dataset": rows}
    if kind == "sft":
        args = SFTConfig(**settings, dataset_kwargs={"skip_prepare_dataset": True})
        return SFTTrainer(model, args=args, processing_class=tokenizer, callbacks=list(callbacks), **data, **extra)
    args = TrainingArguments(**settings)
    collator = DataCollatorForSeq2Seq(tokenizer)
    return Trainer(model, args, data_collator=collator, callbacks=list(callbacks), **data, **extra)


def preferences() -> Dataset:
    rows = [(example.prompt, example.response) for example in sums()]
    return Dataset.from_list(
        [{"prompt": f"question : {q} ", "chosen": a, "rejected": "sorry i can not"} for q, a in rows]
    )


def run(folder: Path, callback: LoxCallback, kind: str = "sft", resume: Any = None, **changes: Any) -> Any:
    """Train under an attached callback, and return the trainer."""
    trainer = make_trainer(folder, kind, **changes)
    callback.attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def moments(callback: LoxCallback) -> list[tuple[int, str]]:
    return [(reading.step, reading.moment) for reading in callback.readings]


def retentions(callback: LoxCallback) -> list[float]:
    return [reading.drift.retention for reading in callback.readings]


def lines(folder: Path) -> list[dict[str, Any]]:
    """The journal, read as strict JSON."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    text = (folder / "lox" / "readings.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def own_rows(trainer: Any) -> list[dict[str, Any]]:
    return [row for row in trainer.state.log_history if "lox/retention" in row]


def other_rows(trainer: Any) -> list[dict[str, Any]]:
    """The trainer's own rows, without what depends on the clock."""
    rows = [row for row in trainer.state.log_history if "lox/retention" not in row]
    return [
        {name: value for name, value in row.items() if "runtime" not in name and "second" not in name} for row in rows
    ]
