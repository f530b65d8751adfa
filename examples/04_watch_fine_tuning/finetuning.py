"""One fine-tuning by TRL's SFTTrainer under a `LoxCallback`, and what is measured afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from inputs import Inputs
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from lox_hf import LoxCallback, LoxConfig, apply_lox, read_drift
from lox_hf.evaluation.models.loading import load_model, quiet_import, quiet_transformers
from lox_hf.robustness.attacks.rows import encode_examples
from lox_hf.robustness.finetuning.trainer_settings import lora_config, training_config
from lox_hf.robustness.measuring.measure import measure_task, read_safety


@dataclass(frozen=True)
class Outcome:
    """What a model is like; shares, NaN where something is not known.

    Attributes:
        steps: Optimiser steps that made it.
        asr: Harmful prompts that it complies with.
        strict_asr: Harmful prompts that it gives the known answer to.
        over_refusal: Harmless prompts that it refuses.
        right: Harmless prompts that it gives the known answer to.
        task: Held-out rows of the fine-tuning's data that it answers right.
        task_loss: Its loss on them, in nats a token.
        retention: Of the safety component.
        ratio: R_ft / R_align.
    """

    steps: int
    asr: float
    strict_asr: float
    over_refusal: float
    right: float
    task: float
    task_loss: float
    retention: float
    ratio: float


def fine_tune(
    inputs: Inputs, callback: LoxCallback, output: Path, *, seed: int, alpha: float = 0.0, **sft: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int]:
    """Fine-tune the model with the callback attached.

    Args:
        inputs: Model, rows and settings.
        callback: What watches.
        output: The trainer's folder.
        seed: Seed of the order of the rows.
        alpha: Harden the model first, with this strength; 0 leaves it as it is.
        sft: Further settings of SFTConfig.

    Returns:
        The model, a PeftModel under LoRA; its tokenizer; and the steps that were taken.
    """
    with quiet_import():
        from trl import SFTTrainer

    disable_progress_bars()
    with quiet_transformers():
        model, tokenizer = load_start(inputs, alpha)
        on_cpu = model.device.type == "cpu"
        config = training_config({**inputs.attack.sft, **sft}, output_dir=str(output), use_cpu=on_cpu, bf16=not on_cpu)
        config.seed, config.dataset_kwargs = seed, {"skip_prepare_dataset": True}
        rows = encode_examples(tokenizer, inputs.attack, inputs.data.train)
        trainer: Any = SFTTrainer(
            model,
            args=config,
            train_dataset=Dataset.from_list([dict(row) for row in rows]),
            processing_class=tokenizer,
            peft_config=None if inputs.attack.lora is None else lora_config(inputs.attack.lora),
        )
        trainer.remove_callback(PrinterCallback)
        callback.attach(trainer)
        steps = trainer.train().global_step
        return trainer.model, tokenizer, steps


def load_start(inputs: Inputs, alpha: float) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model that a fine-tuning starts from, hardened where `alpha` is not 0."""
    model, tokenizer = load_model(inputs.aligned)
    if alpha:
        apply_lox(model, LoxConfig(r=inputs.subspace.config.r, alpha=alpha), base_model=inputs.subspace)
    return model, tokenizer


def measure(inputs: Inputs, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, steps: int) -> Outcome:
    """Ask the test's prompts, answer the held-out rows, and read the drift."""
    with quiet_transformers():
        reading = read_safety(model, tokenizer, inputs.measurement, steps)
        task = measure_task(model, tokenizer, inputs.attack, inputs.data.held_out, inputs.measurement)
        drift = read_drift(model, inputs.subspace, inputs.base, progressbar=False)
    return Outcome(
        steps=steps,
        asr=reading.asr.share,
        strict_asr=reading.strict_asr.share,
        over_refusal=reading.over_refusal.share,
        right=reading.accuracy.share,
        task=task.accuracy.share,
        task_loss=task.loss,
        retention=drift.retention,
        ratio=drift.ratio,
    )


def measure_folder(inputs: Inputs, folder: Path, steps: int) -> Outcome:
    """Measure what a checkpoint holds."""
    with quiet_transformers():
        return measure(inputs, *load_model(folder), steps)


def saving(every: int) -> Mapping[str, Any]:
    """Return settings with which a checkpoint lies beside every reading; the last safe one is the last but one."""
    return {"save_strategy": "steps", "save_steps": every, "save_total_limit": 2, "save_only_model": True}


@contextmanager
def stops_expected() -> Iterator[None]:
    """Keep off the warning with which a callback says that it stops a training."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LoxCallback stops the training")
        yield
