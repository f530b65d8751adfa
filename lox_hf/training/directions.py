"""`find_directions`: the directions of a model as its training begins, from a config that names the base."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lox_hf.config import ALL_LINEAR, LoxConfig
from lox_hf.edit.tensor import BaseFactors
from lox_hf.errors import ConfigError, UnsupportedModelError
from lox_hf.hub_files import BASE_FILES
from lox_hf.inputs import ModelLike, Pair, Side, open_side
from lox_hf.lora import is_peft_model
from lox_hf.records import ModelReference
from lox_hf.subspace import SafetySubspace
from lox_hf.training.backends import LiveWeights, open_weights
from lox_hf.weights.live import linear_modules
from lox_hf.weights.selection import select


def find_directions(
    model: nn.Module,
    config: LoxConfig,
    base_model: ModelLike | None = None,
    *,
    token: str | bool | None = None,
) -> SafetySubspace:
    """Find the directions between a model as it is now and its base.

    The base is read tensor by tensor; of a PeftModel the weights with its active adapters count.

    Args:
        model: The model that is about to be trained.
        config: Settings.
        base_model: The model before alignment; None takes the one that `config` names.
        token: Hub token; None uses the stored login.

    Returns:
        The subspace.

    Raises:
        ConfigError: If no base is named.
        PairingError: If the two models do not fit; all mismatches are listed.
        UnsupportedModelError: If the weights are quantised, or spread over processes and under adapters.
        CheckpointError: If files are missing or damaged.
        NumericsError: If a matrix contains NaN or Inf; it is named.

    Example:
        >>> base, aligned = (torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(2))
        >>> find_directions(aligned, LoxConfig(r=2), base)
        SafetySubspace(1 matrices, r=2, 'Sequential' - 'Sequential')
    """
    model, weights = getattr(model, "_orig_mod", model), open_weights(model)
    spread = "spread over processes, under adapters" if weights.collective and is_peft_model(model) else ""
    if held := spread or ("quantised" if _is_quantised(model) else ""):
        raise UnsupportedModelError(
            f"The weights of {weights.label} are {held}, and directions are not found in these. Find them before: "
            "SafetySubspace.from_models(aligned, base, config).save_pretrained(folder); then pass that folder to "
            "LoxCallback in place of the config."
        )
    if not is_peft_model(model):
        return SafetySubspace.from_models(model, base_model, config, token=token, progressbar=False)
    return SafetySubspace.from_pair(_adapted_pair(model, weights, config, base_model, token), progressbar=False)


def _adapted_pair(
    model: Any, weights: LiveWeights, config: LoxConfig, base_model: ModelLike | None, token: str | bool | None
) -> Pair:
    """A PeftModel and its base; `open_pair` takes models without adapters only."""
    base = base_model if base_model is not None else config.base_model_name_or_path
    if base is None:
        raise ConfigError("No base model is named: pass base_model_name_or_path to LoxConfig.")
    inner = model.get_base_model()
    theirs = open_side(base, "base", revision=config.revision, token=token, files=BASE_FILES, like=inner)
    factors = BaseFactors(theirs.source, config, theirs.reference)
    linear: set[str] = set()
    if config.target_modules == ALL_LINEAR:
        with torch.device("meta"):  # the layers without their adapters
            linear = linear_modules(type(inner)(inner.config))
    plans = select(weights.infos(), config, linear)
    factors.check(weights, plans, config)
    name = getattr(inner.config, "_name_or_path", "") or type(inner).__name__
    named = replace(config, base_model_name_or_path=theirs.reference.name_or_path)
    return Pair(Side(weights, ModelReference(name)), factors, plans, named, theirs.files, "config")


def _is_quantised(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "quantization_config", None) is not None
