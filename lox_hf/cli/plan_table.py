"""What a plan says on the screen: a line per tensor, or per pattern of many, and what the work takes."""

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lox_hf.cli.words import duration

if TYPE_CHECKING:
    from lox_hf.records import HardeningEstimate, HardeningPlan, TensorPlan

LONG = 200
"""Tensors from which on a plan is folded."""


def plan_table(plan: "HardeningPlan") -> str:
    """Return the plan as text: a line per tensor; long ones are folded, a line per pattern of names.

    Args:
        plan: The plan.

    Returns:
        The text.
    """
    folded = len(plan.tensors) > LONG
    groups = fold(plan.tensors) if folded else [(tensor.name, [tensor]) for tensor in plan.tensors]
    shapes = [f"{of[0].shape}{f' x {len(of)}' if folded else ''}" for _, of in groups]
    width, shape_width = max(len(name) for name, _ in groups), max(16, *map(len, shapes))
    rows = [
        f"{name:<{width}}  {shape:<{shape_width}}  {of[0].dtype:<9}  {_action(of[0])}"
        for (name, of), shape in zip(groups, shapes, strict=True)
    ]
    edited = len(plan.edited)
    rows.append(
        f"\n{edited} tensors to edit, {len(plan.tensors) - edited} to copy, {plan.total_bytes / 1e9:.3f} GB. "
        "Nothing was written."
    )
    if folded:
        rows.append(f"Folded: {len(plan.tensors)} tensors in {len(groups)} lines; --json lists each.")
    if plan.left_out:
        rows.append(f"Not copied: {', '.join(plan.left_out)}")
    return "\n".join(rows)


def fold(tensors: "tuple[TensorPlan, ...]") -> "list[tuple[str, list[TensorPlan]]]":
    """Put tensors together that differ in the numbers of their names alone.

    Args:
        tensors: Plans of all tensors.

    Returns:
        Pattern and tensors of each group, in the order of the first of each. A pattern names the numbers that occur
        at each place, such as `model.layers.{0..60}.mlp.gate_proj.weight`; groups of other shapes or settings may
        have the same one.
    """
    alike: defaultdict[tuple[object, ...], list[TensorPlan]] = defaultdict(list)
    for tensor in tensors:
        words = tuple("{}" if word.isdigit() else word for word in tensor.name.split("."))
        alike[words, tensor.shape, tensor.dtype, _action(tensor)].append(tensor)
    return [(_pattern([tensor.name.split(".") for tensor in group]), group) for group in alike.values()]


def estimate_table(plan: "HardeningPlan", estimate: "HardeningEstimate", *, to_hub: bool = False) -> str:
    """Return what the work takes, as text.

    Args:
        plan: The plan.
        estimate: What it takes.
        to_hub: Whether the result goes to the Hub, with two shards on the disk at any time.

    Returns:
        The text.
    """
    who = f"{_count(estimate.processes, 'process', 'processes')} of {_count(estimate.threads, 'thread', 'threads')}"
    disk = "two of the largest shard" if to_hub else f"{estimate.write_bytes / 1e9:.3f} GB needed"
    floor_s = (estimate.read_bytes + estimate.write_bytes) / 1e9
    rows = {
        "to read": f"{estimate.read_bytes / 1e9:.3f} GB (if the base is stored in the aligned model's dtypes)",
        "to write": f"{estimate.write_bytes / 1e9:.3f} GB",
        "disk": disk,
        "memory": f"{estimate.memory_bytes / 2**20:.0f} MiB a process (mapped files come on top as they fit)",
        "time": f"{duration(estimate.work_s)} on {who} (from a probe of this CPU; files in memory)",
        "disk's time": f"{duration(floor_s)} at 1 GB/s, if that is longer",
    }
    if any(isinstance(tensor.r, float) for tensor in plan.edited):
        rows["note"] = "how many directions r as a share needs is known only afterwards: 32 are counted"
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _action(tensor: "TensorPlan") -> str:
    if not tensor.edit:
        return f"copied: {tensor.reason}"
    return f"r {'full' if tensor.r is None else tensor.r}, alpha {tensor.alpha}"


def _pattern(names: list[list[str]]) -> str:
    """One name for several that differ in numbers alone: each place that differs as its ranges."""
    places = [dict.fromkeys(words) for words in zip(*names, strict=True)]
    return ".".join(next(iter(words)) if len(words) == 1 else f"{{{_ranges(map(int, words))}}}" for words in places)


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers as ranges, such as "0..2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("..".join(map(str, run)) for run in runs)


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"
