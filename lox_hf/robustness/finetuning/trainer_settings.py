"""Settings of TRL's SFTConfig and of PEFT's LoraConfig: completed with defaults, and checked before any training."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from lox_hf.errors import ConfigError, listing
from lox_hf.evaluation.models.loading import quiet_import, quiet_transformers
from lox_hf.robustness.attacks.recipe import meant

if TYPE_CHECKING:
    from peft import LoraConfig
    from trl import SFTConfig

DEFAULTS = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
FIXED = {
    "seed": "it is an argument of its own",
    "dataset_kwargs": "rows come as token ids and are taken as they are",
    "packing": "every row is a sequence",
    "padding_free": "every row is a sequence",
    "auto_find_batch_size": "it begins anew with another batch, and so with another number of steps",
}
"""Settings of SFTConfig that a fine-tuning makes itself, and why."""


def training_config(sft: Mapping[str, Any], **defaults: Any) -> "SFTConfig":
    """Return TRL's settings of a fine-tuning.

    Args:
        sft: Settings of SFTConfig.
        defaults: Values of those that `sft` leaves out, besides `DEFAULTS`.

    Returns:
        The SFTConfig.

    Raises:
        ConfigError: If TRL is missing, or settings are unknown, not for the caller, or out of range.

    Example:
        >>> training_config({"max_steps": 3}, output_dir="out", use_cpu=True, bf16=False).max_steps  # doctest: +SKIP
        3
    """
    with quiet_import(), quiet_transformers():
        try:
            import datasets  # noqa: F401
            from trl import SFTConfig
        except ImportError as error:
            raise ConfigError(f"Fine-tuning needs TRL and datasets ({error}): pip install 'lox-hf[trl]'.") from error
        settings: dict[str, Any] = {**DEFAULTS, **defaults, **sft}
        known = {item.name for item in fields(SFTConfig) if item.init}
        problems = [f"there is no {name!r}{meant(name, known)}" for name in sft if name not in known]
        problems += [f"{name!r} cannot be set: {why}" for name, why in FIXED.items() if name in sft]
        try:
            config = None if problems else SFTConfig(**settings)
        except (TypeError, ValueError, ImportError, RuntimeError) as error:
            raise ConfigError(f"Invalid settings of SFTConfig: {one_line(error)}.") from error
    problems += _number_problems(config) if config is not None else []
    if problems or config is None:
        raise ConfigError(f"Invalid settings of SFTConfig: {listing(problems)}")
    return config


def lora_config(lora: Mapping[str, Any]) -> "LoraConfig":
    """Return PEFT's settings of adapters.

    Args:
        lora: Settings of LoraConfig.

    Returns:
        The LoraConfig.

    Raises:
        ConfigError: If PEFT is missing, or settings are unknown or out of range.

    Example:
        >>> lora_config({"r": 4}).r
        4
    """
    with quiet_import():
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ConfigError("Fine-tuning by LoRA needs PEFT: pip install 'lox-hf[peft]'.") from error
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", **lora}
    try:
        return LoraConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Invalid settings of LoraConfig: {one_line(error)}.") from error


def one_line(error: Exception) -> str:
    """Return what an error says as a clause: in one line, without the stop at its end."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _number_problems(config: "SFTConfig") -> Iterator[str]:
    """What SFTConfig itself takes, and the trainer fails on later."""
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps"):
        value = getattr(config, name)
        is_unset = name == "max_steps" and value == -1
        if not is_unset and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            yield f"{name} is {value!r}, expected a positive integer"
    for name in ("num_train_epochs", "learning_rate"):
        value = getattr(config, name)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            yield f"{name} is {value!r}, expected a positive number"
