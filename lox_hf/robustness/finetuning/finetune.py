"""`fine_tune`: one fine-tuning by TRL's SFTTrainer, with calls on the way; afterwards the model is a plain one."""

import copy
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lox_hf.errors import ConfigError, LoxError, PromptError, UnsupportedModelError, listing
from lox_hf.evaluation.models.batch_size import is_out_of_memory
from lox_hf.evaluation.models.checks import check_model, check_vocabulary, context_length, model_name
from lox_hf.evaluation.models.loading import quiet_import, quiet_transformers
from lox_hf.evaluation.models.random_states import random_states_kept
from lox_hf.lora import is_peft_model
from lox_hf.robustness.attacks.rows import TokenRow
from lox_hf.robustness.finetuning.traces import left_plain, plain_forward
from lox_hf.robustness.finetuning.trainer_settings import lora_config, one_line, training_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
    from trl import SFTConfig

OnStep = Callable[[int, nn.Module], bool | None]


@dataclass(frozen=True)
class FineTuned:
    """What came out of a fine-tuning.

    Attributes:
        model: The model, with nothing of the trainer left in it.
        steps: Optimiser steps that were taken.
        train_loss: Mean training loss over them, in nats per token.
    """

    model: "PreTrainedModel"
    steps: int
    train_loss: float


def planned_steps(n_rows: int, sft: Mapping[str, Any]) -> int:
    """Return how many optimiser steps a fine-tuning takes, and check its settings on the way.

    Args:
        n_rows: Rows to train on.
        sft: Settings of TRL's SFTConfig.

    Returns:
        Steps; `fine_tune` takes as many unless it is stopped.

    Raises:
        ConfigError: If TRL is missing, a setting is unknown or out of range, or no step is left to take.

    Example:
        >>> planned_steps(100, {"num_train_epochs": 2, "per_device_train_batch_size": 16})  # doctest: +SKIP
        14
    """
    config = training_config(sft, use_cpu=True, bf16=False, output_dir=tempfile.gettempdir())
    batches = n_rows / config.per_device_train_batch_size
    batches = math.floor(batches) if config.dataloader_drop_last else math.ceil(batches)
    if not batches:
        raise ConfigError(
            f"There is no batch to train on: {n_rows} rows in batches of {config.per_device_train_batch_size}. Pass "
            "more rows, or leave dataloader_drop_last out."
        )
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * math.ceil(batches / config.gradient_accumulation_steps))


def fine_tune(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[TokenRow],
    *,
    sft: Mapping[str, Any],
    learning_rate: float | None = None,
    seed: int,
    lora: Mapping[str, Any] | None = None,
    at_steps: Collection[int] = (),
    on_step: OnStep | None = None,
) -> FineTuned:
    """Fine-tune a model in place by TRL's SFTTrainer, in this process and on the device that it is on.

    Nothing is written, reported or shown unless `sft` says so. Weights keep their dtype; on an accelerator that knows
    bfloat16, passes run in it (mixed precision), on the CPU in the weights' own dtype. One seed gives the same weights
    to the bit on one machine. Global random states are left as they were, and of the model's configs, modes, hooks and
    methods nothing is changed afterwards: it can be evaluated, saved and trained again.

    Args:
        model: The model, in ordinary weights. All that require a gradient are trained.
        tokenizer: Its tokenizer; it is left as it was.
        rows: Token ids and labels, as `lox_hf.robustness.attacks.rows.encode_examples` makes them; used as they are.
        sft: Settings of TRL's SFTConfig.
        learning_rate: Highest learning rate, in place of the one in `sft`.
        seed: Seed of the order of the rows, of dropout and of adapters.
        lora: Settings of PEFT's LoraConfig: adapters are trained and then merged into the weights, which is rounded
            to their dtype; None trains the weights themselves.
        at_steps: Optimiser steps after which `on_step` is called. There is no call before the first step, and none
            for steps that are not reached.
        on_step: Called with the step and the model, a `PeftModel` where `lora` is set; True ends the training there.
            What it does with random numbers and with the model's mode makes no difference to the training.

    Returns:
        The model that was passed, fine-tuned, with its steps and loss.

    Raises:
        ConfigError: If a package is missing, a setting is unknown or out of range or does not fit the model, or the
            tokenizer does not belong to it.
        PromptError: If there are no rows, or rows are longer than the model's context.
        UnsupportedModelError: If the model is quantised, offloaded, a PEFT model or no decoder-only language model, or
            has no weights that can be trained.
        LoxError: If the memory does not suffice.

    Example:
        >>> rows = encode_examples(tokenizer, attack, load_attack(attack).train)  # doctest: +SKIP
        >>> fine_tune(model, tokenizer, rows, sft=attack.sft, seed=0).steps  # doctest: +SKIP
        14
    """
    _check_trainable(model, tokenizer, lora)
    check_rows(model, tokenizer, rows)
    given = dict(sft) if learning_rate is None else {**sft, "learning_rate": learning_rate}
    with (
        tempfile.TemporaryDirectory(prefix="lox-hf-") as folder,
        quiet_transformers(),
        random_states_kept(),
        left_plain(model),
    ):
        config = training_config(given, output_dir=folder, **_placement(model, given))
        config.seed, config.dataset_kwargs = seed, {"skip_prepare_dataset": True}
        config._n_gpu = min(config.n_gpu, 1)  # the trainer would spread the model over all devices that it sees
        return _train(model, tokenizer, rows, config, lora, frozenset(at_steps), on_step)


def check_rows(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: Sequence[TokenRow]) -> None:
    """Refuse rows that a model cannot read.

    Args:
        model: The model.
        tokenizer: What encoded them.
        rows: The rows.

    Raises:
        ConfigError: If there are token ids that the model has no embedding for.
        PromptError: If there are no rows, or rows are longer than the model's context.
    """
    context, name = context_length(model), model_name(model)
    lengths = [len(row["input_ids"]) for row in rows]
    if not lengths:
        raise PromptError(f"There are no rows to train '{name}' on.")
    check_vocabulary(model, tokenizer, (row["input_ids"] for row in rows))
    over = sum(length > context for length in lengths) if context else 0
    if over:
        raise PromptError(
            f"{over} of {len(rows)} rows are longer than the context of '{name}', {context} tokens; the longest has "
            f"{max(lengths)}. Lower sft's max_length to {context}, so that they are cut, or leave them out."
        )


def _train(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[TokenRow],
    config: "SFTConfig",
    lora: Mapping[str, Any] | None,
    at_steps: Collection[int],
    on_step: OnStep | None,
) -> FineTuned:
    from datasets import Dataset
    from transformers import PrinterCallback

    with quiet_import():
        from trl import SFTTrainer

    callback = _callback(model, at_steps, on_step)
    longest = max(len(row["input_ids"]) for row in rows)
    batch = f"batches of {config.per_device_train_batch_size} rows of up to {longest} tokens"
    with _as_our_errors(model, batch, callback):
        trainer: Any = SFTTrainer(
            model,
            args=config,
            train_dataset=Dataset.from_list([dict(row) for row in rows]),
            processing_class=copy.deepcopy(tokenizer),  # it gets the padding token that the trainer wants
            peft_config=None if lora is None else lora_config(lora),
            callbacks=[callback],
        )
        trainer.remove_callback(PrinterCallback)
        outcome = trainer.train()
    trained = trainer.model if lora is None else trainer.model.merge_and_unload()
    return FineTuned(trained, outcome.global_step, outcome.training_loss)


def _placement(model: "PreTrainedModel", sft: Mapping[str, Any]) -> dict[str, bool]:
    """Where the model is, and in which precision. TRL's own default is bfloat16 everywhere, float32 on a CPU too."""
    from transformers.utils import is_torch_bf16_gpu_available

    on_cpu = model.device.type == "cpu"
    return {"use_cpu": on_cpu, "bf16": not on_cpu and not sft.get("fp16") and is_torch_bf16_gpu_available()}


def _check_trainable(model: Any, tokenizer: Any, lora: Mapping[str, Any] | None) -> None:
    check_model(model, tokenizer)
    weights = list(model.parameters())
    problems = {
        "it is a PEFT model; pass what model.merge_and_unload() returns": is_peft_model(model),
        "it is quantised, so its numbers are codes and no weights; load it without quantization_config, or call "
        "model.dequantize()": getattr(model.config, "quantization_config", None) is not None,
        "weights are on the meta device (not loaded, or offloaded); load it into memory": any(
            weight.is_meta for weight in weights
        ),
        "none of its weights requires a gradient; call model.requires_grad_(True)": lora is None
        and not any(weight.requires_grad for weight in weights),
    }
    found = [problem for problem, is_one in problems.items() if is_one]
    if found:
        raise UnsupportedModelError(f"Cannot fine-tune '{model_name(model)}': {listing(found)}")


@contextmanager
def _as_our_errors(model: "PreTrainedModel", batch: str, callback: Any) -> Iterator[None]:
    """Say in one line what a setting has broken before the training began, and when the memory does not suffice."""
    try:
        yield
    except LoxError:
        raise
    except (RuntimeError, MemoryError, TypeError, ValueError, ImportError) as error:
        if is_out_of_memory(error):
            raise LoxError(
                f"The memory of {model.device} does not suffice to fine-tune '{model_name(model)}' in {batch}: lower "
                "per_device_train_batch_size and raise gradient_accumulation_steps by as much, set "
                "gradient_checkpointing, lower max_length, or train by LoRA."
            ) from error
        if callback.has_begun:
            raise
        raise ConfigError(f"Cannot fine-tune '{model_name(model)}' with these settings: {one_line(error)}.") from error


def _callback(model: nn.Module, at_steps: Collection[int], on_step: OnStep | None) -> "TrainerCallback":
    """What calls `on_step`."""
    from transformers import TrainerCallback

    forward = vars(model).get("forward")

    class Calling(TrainerCallback):
        has_begun = False

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.has_begun = True

        def on_step_end(self, args: Any, state: Any, control: Any, **found: Any) -> None:
            if on_step is None or state.global_step not in at_steps:
                return
            with random_states_kept(), plain_forward(found["model"], model, forward):
                if on_step(state.global_step, found["model"]):
                    control.should_training_stop = True

    return Calling()
