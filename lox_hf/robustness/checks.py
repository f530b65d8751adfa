"""What can be known of a stress test without any training: whether its settings and rows fit the aligned model."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from lox_hf.errors import ConfigError, UnsupportedModelError
from lox_hf.evaluation.data.gsm8k import load_questions
from lox_hf.evaluation.judges import get_judge
from lox_hf.evaluation.models.checks import model_name
from lox_hf.evaluation.models.loading import quiet_import, quiet_transformers
from lox_hf.evaluation.models.local import LocalModel
from lox_hf.evaluation.utility import load_texts
from lox_hf.robustness.attacks.examples import Example
from lox_hf.robustness.attacks.rows import Attack, AttackData, encode_examples
from lox_hf.robustness.controls import CONTROL_ROWS, ControlTraining
from lox_hf.robustness.finetuning.finetune import check_rows, planned_steps
from lox_hf.robustness.finetuning.trainer_settings import lora_config, one_line
from lox_hf.robustness.measuring.measure import Measurement, named_judge
from lox_hf.robustness.rescale import rescale_residual

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGES = {"trl": "trl", "datasets": "trl", "matplotlib": "plot"}


def check_packages(*, lora: bool) -> None:
    """Refuse to begin without the packages that a stress test needs.

    Args:
        lora: Whether an attack trains adapters.

    Raises:
        ConfigError: If some are missing, with their extras.
    """
    needed = {**PACKAGES, "peft": "peft"} if lora else PACKAGES
    extras = {extra for package, extra in needed.items() if find_spec(package) is None}
    if extras:
        raise ConfigError(f"A stress test needs more packages: pip install 'lox-hf[{','.join(sorted(extras))}]'.")


def check_measurement(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", measurement: Measurement, *, here: bool
) -> None:
    """Find everything that is measured with, and ask nothing.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        measurement: What is measured.
        here: Whether this process measures; a judge that it has made is then made for good.

    Raises:
        ConfigError: If a judge or a template is not there, or what the utility needs.
        PromptError: If questions or texts cannot be read.
        CheckpointError: If the files of the judge's model cannot be loaded.
    """
    LocalModel(model, tokenizer, template=measurement.template, max_new_tokens=measurement.max_new_tokens)
    if isinstance(measurement.judge, str):
        (named_judge if here else get_judge)(measurement.judge)
    measure, data = measurement.utility_measure, measurement.utility_data
    if measure == "gsm8k":
        load_questions(data or "gsm8k", measurement.utility_n)
    if measure == "perplexity":
        load_texts(data or "")


def check_attack(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", attack: Attack, data: AttackData
) -> None:
    """Put an attack's rows and its adapters to the model, and take them off again.

    Args:
        model: The model; no weight of it is changed, but adapters that are tried on leave it without gradients.
        tokenizer: Its tokenizer.
        attack: The attack.
        data: Its rows.

    Raises:
        ConfigError: If rows cannot be encoded, or adapters do not fit.
        PromptError: If rows are longer than the model's context.
    """
    for examples in filter(None, (data.train, data.held_out)):
        check_rows(model, tokenizer, encode_examples(tokenizer, attack, examples))
    if attack.lora is None:
        return
    config = lora_config(attack.lora)
    try:
        with quiet_import(), quiet_transformers():
            from peft import get_peft_model

            get_peft_model(model, config).unload()
    except (ValueError, TypeError) as error:
        raise ConfigError(f"Cannot attack '{model_name(model)}' by LoRA: {one_line(error)}.") from error


def check_control(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    training: ControlTraining,
    examples: Sequence[Example],
) -> None:
    """Put the rows that a control is trained on to the model.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        training: How it is trained.
        examples: The rows.

    Raises:
        ConfigError: If settings are unknown or out of range, or rows cannot be encoded.
        PromptError: If rows are longer than the model's context.
    """
    check_rows(model, tokenizer, encode_examples(tokenizer, CONTROL_ROWS, examples))
    planned_steps(len(examples), training.settings(training.retrain_steps))


def why_not_rescaled(model: "PreTrainedModel") -> UnsupportedModelError | None:
    """Rescale the model if it can be.

    Args:
        model: The model; it is changed where nothing keeps it from being rescaled.

    Returns:
        What keeps it; None where nothing does.
    """
    try:
        rescale_residual(model)
    except UnsupportedModelError as error:
        return error
    return None
