"""Aligned with base by name; every mismatch is reported at once, with its remedy."""

import json
from collections.abc import Iterable, Mapping

from lox_hf.config import LoxConfig
from lox_hf.errors import PairingError, listing
from lox_hf.records import TensorPlan
from lox_hf.weights.selection import TIED_HEAD, matches, module_name
from lox_hf.weights.source import TensorInfo, WeightSource


def check_pairs(aligned: WeightSource, base: WeightSource, plans: list[TensorPlan], config: LoxConfig) -> None:
    """Check that every tensor that is edited has its counterpart in the base.

    Tensors that are copied need none, but a tensor the base lacks is reported all the same unless it is excluded: it
    says that the two are not the same architecture.

    Args:
        aligned: The aligned model.
        base: The model before alignment.
        plans: What is done to each tensor of the aligned model.
        config: Settings, for what is excluded.

    Raises:
        PairingError: If tensors are missing, extra, or of another shape or dtype; all are listed.
    """
    ours, theirs = aligned.infos(), base.infos()
    scaled = {info.scale_of for infos in (ours, theirs) for info in infos.values()}
    tables = [module_name(plan.name).rpartition(".")[2] for plan in plans if _is_resized(plan, ours, theirs)]
    problems = [
        problem
        for plan in plans
        for problem in _problems(plan, ours[plan.name], theirs.get(plan.name), config, tables, scaled)
    ]
    problems += [
        f"{name}: {info.shape}, only in base{_tied_remedy(name)}"
        for name, info in theirs.items()
        if name not in ours and len(info.shape) > 1 and not info.scale_of and not _excused(name, config)
    ]
    if not problems:
        return
    remedy = (
        "" if any(name in theirs for name in ours) else " No tensor name is shared: these are different architectures."
    )
    raise PairingError(
        f"Cannot pair {aligned.label} with {base.label}: {len(problems)} tensors differ. {listing(problems)}{remedy}"
    )


def _problems(
    plan: TensorPlan,
    ours: TensorInfo,
    theirs: TensorInfo | None,
    config: LoxConfig,
    tables: list[str],
    scaled: set[str],
) -> Iterable[str]:
    if theirs is None:
        if plan.edit or (_is_floating(ours) and not ours.scale_of and not _excused(plan.name, config)):
            yield f"{plan.name}: missing in base{_tied_remedy(plan.name)}"
    elif plan.edit and ours.shape != theirs.shape:
        resized = module_name(plan.name).rpartition(".")[2] in tables
        remedy = f" [resized vocabulary: pass exclude_modules={json.dumps(tables)}]" if resized else ""
        yield f"{plan.name}: {ours.shape} against {theirs.shape}{remedy}"
    elif plan.edit and ours.stored != theirs.stored and plan.name not in scaled:  # with scales, it is any dtype's peer
        if not (config.cast_base and _can_be_cast(ours, theirs)):
            yield f"{plan.name}: {ours.stored} against {theirs.stored} [another dtype: {_dtype_remedy(ours, theirs)}]"


def _tied_remedy(name: str) -> str:
    """What to do where only one side has an output head of its own."""
    return f' [tied head: pass exclude_modules=["{TIED_HEAD}"]]' if module_name(name) == TIED_HEAD else ""


def _excused(name: str, config: LoxConfig) -> bool:
    """Whether the user has taken this tensor out of the comparison."""
    module = module_name(name)
    if matches(config.exclude_modules, module):
        return True
    targets = config.target_modules
    return isinstance(targets, list) and not matches(targets, module)


def _is_floating(info: TensorInfo) -> bool:
    return info.dtype is not None and info.dtype.is_floating_point


def _can_be_cast(ours: TensorInfo, theirs: TensorInfo) -> bool:
    """Whether the base can be rounded to the aligned dtype: float8 is not, as it is read in another."""
    return not ours.read_as and _is_floating(theirs) and theirs.dtype is not None and theirs.dtype.itemsize >= 2


def _is_resized(plan: TensorPlan, ours: Mapping[str, TensorInfo], theirs: Mapping[str, TensorInfo]) -> bool:
    """Whether this is an embedding or head with another number of tokens: a matrix that belongs to no layer."""
    if not plan.edit or plan.name not in theirs or any(part.isdigit() for part in plan.name.split(".")):
        return False
    here, there = ours[plan.name].shape, theirs[plan.name].shape
    return len(here) == len(there) == 2 and here[1] == there[1] and here[0] != there[0]


def _dtype_remedy(ours: TensorInfo, theirs: TensorInfo) -> str:
    if _can_be_cast(ours, theirs):
        return "pass cast_base=True (--cast-base) to round the base to the aligned dtype first"
    return "use a base in the same precision"
