"""Which matrices of a model a reading takes, and whether they fit the subspace and the base."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lox_hf.config import ALL_LINEAR, LoxConfig
from lox_hf.edit.tensor import is_stack, matrix_names
from lox_hf.errors import ConfigError, PairingError, listing
from lox_hf.lora import is_peft_model
from lox_hf.subspace import SafetySubspace
from lox_hf.weights.live import as_checkpoint, linear_modules, meta_model
from lox_hf.weights.selection import EDITABLE, TIED_HEAD, matrix_shape, module_name, select
from lox_hf.weights.source import TensorInfo, WeightSource


def selected_tensors(
    source: WeightSource,
    modules: nn.Module | Path | None,
    target_modules: list[str] | str | None,
    trust_remote_code: bool,
) -> list[str]:
    """Return the names of the tensors that a reading is asked for.

    Args:
        source: The model's tensors.
        modules: The model itself or its folder, which say what its modules are; None for a state dict.
        target_modules: Which, in the forms of `LoxConfig`; None takes every linear layer, the output head included.
        trust_remote_code: Run modelling code of the folder.

    Returns:
        Checkpoint names.

    Raises:
        ConfigError: If nothing matches, or a state dict is asked for its linear layers.
    """
    linear: set[str] = set()
    if target_modules in (None, ALL_LINEAR):
        if modules is None:
            raise ConfigError("A state dict does not know its linear layers: name the matrices with target_modules.")
        if isinstance(modules, Path):
            modules = meta_model(modules, trust_remote_code=trust_remote_code)
        linear = linear_modules(modules) if target_modules else _linear_maps(modules)
    config = LoxConfig(r=1, target_modules=target_modules or ALL_LINEAR)
    return [plan.name for plan in select(source.infos(), config, linear) if plan.edit]


def _linear_maps(model: nn.Module) -> set[str]:
    """Names, as in the checkpoint, of all linear layers: the head, Conv1D and stacks of experts included."""
    from transformers.pytorch_utils import Conv1D

    weights = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))}
    # Told by the parameter and not by the module's name: a tied head is stored under the embedding's.
    base, parameters = model, dict(model.named_parameters(remove_duplicate=False))
    if is_peft_model(model):
        from lox_hf.training.backends.adapters import base_parameters

        base = cast("Any", model).get_base_model()
        parameters = base_parameters(base)
    shapes = {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in parameters.items()}
    return {
        module_name(stored)
        for name, tensor in parameters.items()
        if id(tensor) in weights or is_stack(shapes[name])
        for stored in as_checkpoint(base, {name: torch.empty(shapes[name], device="meta")})
    }


def held_tensors(model: WeightSource, subspace: SafetySubspace, selected: Sequence[str]) -> list[str]:
    """Return the selected tensors that the subspace has directions of.

    Args:
        model: The model's tensors.
        subspace: The directions.
        selected: What was asked for.

    Returns:
        Names of tensors.

    Raises:
        PairingError: If it holds none of them.
    """
    infos = model.infos()
    held = [name for name in selected if any(matrix in subspace.factors for matrix in _names(name, infos[name]))]
    if not held:
        raise PairingError(
            f"The subspace holds none of the matrices that are asked for: {listing(selected, 5)} It holds "
            f"{listing(subspace.factors, 5)} Name some of them with target_modules, or make it again of more."
        )
    return held


def warn_of_absent(model: WeightSource, subspace: SafetySubspace, selected: Sequence[str]) -> None:
    """Warn of selected matrices that the subspace has no directions of.

    Args:
        model: The model's tensors.
        subspace: The directions.
        selected: What was asked for.
    """
    infos = model.infos()
    absent = [matrix for name in selected for matrix in _names(name, infos[name]) if matrix not in subspace.factors]
    if absent:
        warnings.warn(
            f"The subspace does not hold {len(absent)} of the matrices that are asked for, so the drift is read "
            f"without them: {listing(absent, 5)}",
            stacklevel=3,
        )


def _unlike_base(name: str, ours: TensorInfo, theirs: TensorInfo | None) -> Iterator[str]:
    if theirs is None:
        yield f"{name}: missing in base"
    elif ours.shape != theirs.shape:
        yield f"{name}: {ours.shape} against {theirs.shape} in base"
    elif theirs.dtype not in EDITABLE:
        yield f"{name}: stored as {theirs.stored} in base, not as float32, float16 or bfloat16"


def _misshapen(name: str, ours: TensorInfo, subspace: SafetySubspace) -> Iterator[str]:
    shape = matrix_shape(ours.shape)[1:]
    for matrix in _names(name, ours):
        directions = subspace.factors.get(matrix)
        if directions is not None and directions.shape != shape:
            yield f"{matrix}: {shape} against {directions.shape} in the subspace"


def _names(name: str, info: TensorInfo) -> list[str]:
    return matrix_names(name, info.shape)


def check_fit(
    model: WeightSource, base: WeightSource | None, subspace: SafetySubspace, selected: Sequence[str]
) -> None:
    """Check that a model, its base and the directions belong together, as far as names and shapes tell.

    Another dtype is no mismatch: a bfloat16 model is often trained in float32. Nor is a matrix that the subspace does
    not hold: it may have been made of fewer.

    Args:
        model: The model's tensors.
        base: The base's; None where none is read.
        subspace: The directions.
        selected: Tensors that are read.

    Raises:
        PairingError: If they do not fit; all mismatches are listed.
    """
    infos = model.infos()
    problems = [p for name in selected for p in _misshapen(name, infos[name], subspace)]
    if base is not None:
        theirs = base.infos()
        problems = [p for name in selected for p in _unlike_base(name, infos[name], theirs.get(name))] + problems
    there = {matrix for name, info in infos.items() if len(info.shape) > 1 for matrix in _names(name, info)}
    # A head that is tied in memory may still have its own tensor in the files the subspace was made from.
    problems += [
        f"{matrix}: only in the subspace"
        for matrix in subspace.factors
        if matrix not in there and module_name(matrix) != TIED_HEAD
    ]
    if problems:
        report = subspace.report
        against = report.base.name_or_path if report.base else "a base in memory"
        of = f" from {base.label}" if base else ""
        raise PairingError(
            f"Cannot read the drift of {model.label}{of}: {len(problems)} matrices differ. {listing(problems)} The "
            f"subspace is of '{report.aligned.name_or_path}' - '{against}': read a model that was trained from this "
            f"one{', with this base' if base else ''}; target_modules leaves matrices out."
        )
