"""Which tensors are edited, at which rank and alpha, and why; PEFT's matching rules on checkpoint names."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple, TypeVar

import torch

from lox_hf.config import ALL_LINEAR, LoxConfig
from lox_hf.errors import ConfigError, UnsupportedModelError, listing
from lox_hf.records import TensorPlan
from lox_hf.weights.source import TensorInfo

EDITABLE = (torch.float32, torch.float16, torch.bfloat16)
MIN_KERNEL_SIDE = 16
TIED_HEAD = "lm_head"
"""May be named although the checkpoint does not hold it: a head that is tied to the embedding has no tensor."""

Value = TypeVar("Value")


def select(infos: Mapping[str, TensorInfo], config: LoxConfig, linear_modules: Iterable[str] = ()) -> list[TensorPlan]:
    """Plan every tensor of a checkpoint.

    Args:
        infos: Shape and dtype by checkpoint name.
        config: What to edit.
        linear_modules: Names of the linear modules but the head; only read for "all-linear".

    Returns:
        One plan per tensor, in the order of `infos`.

    Raises:
        ConfigError: If a pattern matches nothing, or `r` exceeds the smaller side of every selected tensor.
        UnsupportedModelError: If a selected tensor is stored in a dtype that cannot be edited.
    """
    linear = frozenset(linear_modules)
    plans = [_plan(name, info, config, linear) for name, info in infos.items()]
    _check_patterns(infos, plans, config)
    _check_dtypes(infos, plans)
    _check_ranks(plans, config)
    return plans


def module_name(tensor_name: str) -> str:
    """Name of the module a tensor belongs to; fused parameters without a `.weight` ending are their own module."""
    return tensor_name.removesuffix(".weight")


class LayerPlace(NamedTuple):
    """Where in the layers a module lies.

    Attributes:
        stack: What the layers are in, such as "model.layers"; a model may have several.
        number: Number of the layer.
        rest: The module's name within its layer, such as "self_attn.q_proj".
    """

    stack: str
    number: int
    rest: str


def layer_place(module: str, layers_pattern: list[str] | str | None = None) -> LayerPlace | None:
    """Find the layer a module lies in, by PEFT's rule: the first number that follows the name of a list of layers.

    Args:
        module: Name of the module.
        layers_pattern: Names of lists of layers, as in `LoxConfig`; None takes any name.

    Returns:
        The place; None outside the layers.

    Example:
        >>> layer_place("model.layers.3.block_sparse_moe.experts.5.w1")
        LayerPlace(stack='model.layers', number=3, rest='block_sparse_moe.experts.5.w1')
    """
    patterns = layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # Named, so that groups of the user's pattern do not shift them.
        found = re.match(rf"(?P<stack>(?:|.*?\.)(?:{pattern}))\.(?P<number>\d+)\.(?P<rest>.*)", module)
        if found:
            return LayerPlace(found["stack"], int(found["number"]), found["rest"])
    return None


def is_editable(info: TensorInfo) -> bool:
    """Whether a tensor is read in a dtype in which numbers are added and rounded once."""
    return (info.read_as or info.dtype) in EDITABLE


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """How a tensor is read as matrices: (count, m, n).

    Two dims are one matrix. Three dims are a stack of matrices, as fused experts are stored. Convolution kernels (four
    dims and more, or three with a last side below 16) are one matrix of shape (out, everything else).

    Args:
        shape: Shape with two or more dims.

    Returns:
        Number of matrices and the two sides of each.
    """
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    if len(shape) == 3 and shape[2] >= MIN_KERNEL_SIDE:
        return shape
    size = 1
    for side in shape[1:]:
        size *= side
    return 1, shape[0], size


def _plan(name: str, info: TensorInfo, config: LoxConfig, linear: frozenset[str]) -> TensorPlan:
    module = module_name(name)
    edit, reason = _decide(module, info, config, linear)
    r = get_pattern_value(config.rank_pattern, module, config.r) if edit else None
    alpha = float(get_pattern_value(config.alpha_pattern, module, config.alpha)) if edit else 0.0
    if edit and isinstance(r, int):
        smaller = min(matrix_shape(info.shape)[1:])
        if r > smaller:
            reason += f"; r = {r} exceeds the smaller side, all {smaller} directions are used"
    return TensorPlan(name, info.shape, info.stored, r, alpha, edit, reason)


def _decide(module: str, info: TensorInfo, config: LoxConfig, linear: frozenset[str]) -> tuple[bool, str]:
    if info.scale_of:
        return False, f"scale of {info.scale_of}"
    if len(info.shape) < 2:
        return False, "fewer than two dims"
    if info.dtype is not None and not info.dtype.is_floating_point:
        return False, "not floating point"
    if why := why_left_out(module, config, linear):
        return False, why
    return True, "all tensors with two or more dims" if config.target_modules is None else "target"


def why_left_out(module: str, config: LoxConfig, linear_modules: Collection[str] = ()) -> str:
    """Say why the settings leave a module out, whatever its weights are; empty where they do not.

    Args:
        module: Name of the module.
        config: What to edit.
        linear_modules: Names of the linear modules but the head; only read for "all-linear".

    Returns:
        The reason.
    """
    if matches(config.exclude_modules, module):
        return "excluded"
    if config.target_modules == ALL_LINEAR:
        if module not in linear_modules:
            return "not a linear layer"
    elif config.target_modules is not None and not matches(config.target_modules, module):
        return "not a target"
    by_full_name = isinstance(config.target_modules, list) and module in config.target_modules
    if not by_full_name and not _in_layers(module, config):  # as in PEFT, a full name needs no layer number
        return "not in layers_to_transform"
    return ""


def matches(patterns: list[str] | str | None, module: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list matches whole names or their ends."""
    if not patterns:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, module) is not None
    return module in patterns or any(module.endswith(f".{pattern}") for pattern in patterns)


def _layer(module: str, config: LoxConfig) -> int | None:
    """Number of the layer a module lies in; None outside the layers."""
    place = layer_place(module, config.layers_pattern)
    return None if place is None else place.number


def _in_layers(module: str, config: LoxConfig) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    return _layer(module, config) in ([wanted] if isinstance(wanted, int) else wanted)


def get_pattern_value(patterns: Mapping[str, Value] | None, module: str, default: Value) -> Value:
    """PEFT's rule for rank_pattern: the first key that matches the end of the name after a dot, or all of it."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _check_patterns(infos: Mapping[str, TensorInfo], plans: list[TensorPlan], config: LoxConfig) -> None:
    modules = [module_name(name) for name in infos]
    matrices = [module_name(name) for name, info in infos.items() if len(info.shape) >= 2]
    problems = _unmatched("target_modules", config.target_modules, modules)
    problems += _unmatched("exclude_modules", config.exclude_modules, [*modules, TIED_HEAD])
    problems += _missing_layers(config, matrices)
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field) or {}:
            if not any(re.match(rf"(.*\.)?({key})$", module) for module in matrices):
                problems.append(f"{field}: {key!r} matches no module")
    if not problems and not any(plan.edit for plan in plans):
        problems.append("the settings together select no tensor")
    if problems:
        raise ConfigError(
            f"The settings do not fit the model: {listing(problems)} Modules are named like {listing(matrices, 8)}"
        )


def _missing_layers(config: LoxConfig, modules: list[str]) -> list[str]:
    wanted = config.layers_to_transform
    if wanted is None:
        return []
    there = {layer for module in modules if (layer := _layer(module, config)) is not None}
    missing = sorted(set([wanted] if isinstance(wanted, int) else wanted) - there)
    span = f"the layers are {min(there)} to {max(there)}" if there else "no module lies in numbered layers"
    return [f"layers_to_transform: there is no layer {', '.join(map(str, missing))}, {span}"] if missing else []


def _unmatched(field: str, value: list[str] | str | None, modules: list[str]) -> list[str]:
    """Problems of one field: a regular expression, or every name of a list, must match some module."""
    if value is None or value == ALL_LINEAR:
        return []
    patterns: list[list[str] | str] = [value] if isinstance(value, str) else [[name] for name in value]
    return [
        f"{field}: {pattern if isinstance(pattern, str) else pattern[0]!r} matches no module"
        for pattern in patterns
        if not any(matches(pattern, module) for module in modules)
    ]


def _check_dtypes(infos: Mapping[str, TensorInfo], plans: list[TensorPlan]) -> None:
    wrong = [f"{plan.name}: {plan.dtype}" for plan in plans if plan.edit and not is_editable(infos[plan.name])]
    if wrong:
        raise UnsupportedModelError(
            f"{len(wrong)} selected tensors are stored in a dtype that cannot be edited: {listing(wrong)} "
            "Start from a float32, float16, bfloat16 or float8 checkpoint, or exclude them with exclude_modules."
        )


def _check_ranks(plans: list[TensorPlan], config: LoxConfig) -> None:
    """Refuse an `r` that is larger than every matrix, and one asked for by name that does not fit."""
    edited = [plan for plan in plans if plan.edit and isinstance(plan.r, int)]
    over = [plan for plan in edited if (plan.r or 0) > min(matrix_shape(plan.shape)[1:])]
    by_name = [
        plan for plan in over if get_pattern_value(config.rank_pattern, module_name(plan.name), None) is not None
    ]
    wrong = over if over and len(over) == len(edited) else by_name
    if wrong:
        raise ConfigError(
            "r exceeds the smaller side: "
            + listing(f"{plan.name}: r = {plan.r} against shape {plan.shape}" for plan in wrong)
            + " Lower r, or pass r=None (--r full) for the full rank."
        )
