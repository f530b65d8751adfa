"""The work on a checkpoint in parts: cut by cost over processes, and into pieces that are finished one by one."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeVar

Item = TypeVar("Item")

PART_BYTES = 4 * 2**30
"""Weights of a part: what a kill can cost a process; waiting for the disk after each costs nothing that shows."""


def cut(items: Sequence[Item], costs: Sequence[float], count: int) -> list[list[Item]]:
    """Cut items into `count` runs of neighbours of about equal cost; each misses it by one item at most.

    Args:
        items: Items in order.
        costs: Cost of each, in any unit.
        count: Number of runs.

    Returns:
        The runs; some are empty where there are fewer items.

    Example:
        >>> cut("abcd", [3, 1, 1, 1], 2)
        [['a'], ['b', 'c', 'd']]
    """
    runs: list[list[Item]] = [[] for _ in range(count)]
    total = sum(costs)
    for item, cost, end in zip(items, costs, accumulate(costs), strict=True):
        middle = (end - cost / 2) / total if total else 0.0
        runs[min(count - 1, int(middle * count))].append(item)
    return runs


def part_numbers(
    names: Sequence[str], file_of: Callable[[str], str], bytes_of: Callable[[str], int]
) -> dict[str, int]:
    """Cut a run of tensors into parts: a part lies in one file and has `PART_BYTES`, or one tensor more.

    Args:
        names: The tensors, in file order.
        file_of: The file of each.
        bytes_of: The size of each, in bytes.

    Returns:
        Number of the part that each tensor belongs to, from 0, in the same order.
    """
    numbers: dict[str, int] = {}
    part, size, file = -1, 0, ""
    for name in names:
        if file != file_of(name) or size >= PART_BYTES:
            part, size, file = part + 1, 0, file_of(name)
        numbers[name] = part
        size += bytes_of(name)
    return numbers
