"""The view by layers: in which matrices the change lies that alignment made, and how low its rank is there."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeVar, cast

from lox_hf.errors import ConfigError, listing
from lox_hf.records import DriftReading, LayerEntry, LayerMap
from lox_hf.subspace import SafetySubspace
from lox_hf.weights.selection import layer_place, module_name

IN_MEMORY = "a model in memory"
MOST_NAMED = 3
STACKED = re.compile(r"\[\d+\]$")
"""What follows the tensor's name in the name of one matrix of a stack."""
Key = TypeVar("Key")


def layer_map(subspace: SafetySubspace, reading: DriftReading | None = None, tuned: str = "") -> LayerMap:
    """Lay the directions of all matrices out by layer and kind: ||dW||_F^2, its low-rank share, singular values.

    Nothing is decomposed and no model is read: the subspace knows all of it.

    Args:
        subspace: Directions of the aligned model.
        reading: Drift of another model, as `lox_hf.training.monitor.read_drift` returns it for these directions; its
            retention is laid out too.
        tuned: What that model is called.

    Returns:
        The map, a record a matrix.

    Raises:
        ConfigError: If the reading holds none of the matrices.

    Example:
        >>> import torch
        >>> from lox_hf import LoxConfig, SafetySubspace
        >>> base, aligned = (torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False)) for _ in range(2))
        >>> found = layer_map(SafetySubspace.from_models(aligned, base, LoxConfig(r=2)))
        >>> [(entry.name, entry.layer, entry.change_share) for entry in found.entries]
        [('0.weight', None, 1.0)]

    Source: Perin et al., COLM 2025, section 3 (energy of the top-k directions); retention as in `read_drift`.
    """
    reports = subspace.report.tensors
    retained = {} if reading is None else {drift.name: drift.retention for drift in reading.tensors}
    if reading is not None and not any(report.name in retained for report in reports):
        raise ConfigError(
            f"The reading holds none of the {len(reports)} matrices of these directions, it has "
            f"{listing(retained, 5) if retained else 'no matrices at all.'} Read the drift with these directions."
        )
    total = math.fsum(report.delta_norm**2 for report in reports)
    places = _places([report.name for report in reports], subspace.config.layers_pattern)
    entries = tuple(
        LayerEntry(
            report.name,
            *places[report.name],
            report.shape,
            report.delta_norm**2 / total,
            report.energy_share,
            report.singular_values,
            retained.get(report.name, math.nan),
        )
        for report in reports
    )
    about = subspace.report
    # `SafetySubspace` refuses None, the full rank.
    r = cast("int | float", subspace.config.r)
    return LayerMap(about.aligned, about.base, entries, r, (tuned or IN_MEMORY) if reading is not None else "")


def where_most_lies(found: LayerMap) -> str:
    """Say in words in which matrices most of the change lies.

    Args:
        found: The map.

    Returns:
        A sentence for what is outside the layers, and one for what is in them.
    """
    changed = [entry for entry in found.entries if entry.change_share > 0]
    inside = [entry for entry in changed if entry.layer is not None]
    outside = [entry for entry in changed if entry.layer is None]
    parts = []
    if outside:
        parts.append(f"{_share(outside)} of the change lies outside the layers: {_largest(outside)}.")
    if inside:
        layers = _shares(inside, lambda entry: entry.layer)
        parts.append(
            f"{_share(inside)} of the change lies in the layers: {_largest(inside)}; half of that in {_half(layers)} "
            f"of {len(found.by_layer().keys() - {None})} layers."
        )
    return " ".join(parts)


def _places(names: Sequence[str], layers_pattern: list[str] | str | None) -> dict[str, tuple[int | None, str]]:
    """Layer and kind of every matrix."""
    modules = {name: module_name(STACKED.sub("", name)) for name in names}
    places = {name: layer_place(module, layers_pattern) for name, module in modules.items()}
    stacks = {place.stack for place in places.values() if place is not None}
    found: dict[str, tuple[int | None, str]] = {}
    for name, place in places.items():
        if place is None:
            found[name] = None, modules[name]
            continue
        # A vision tower's q_proj is not the language model's.
        whole = f"{place.stack}.{place.rest}" if len(stacks) > 1 else place.rest
        found[name] = place.number, ".".join(part for part in whole.split(".") if not part.isdigit())
    return found


def _shares(entries: Sequence[LayerEntry], key_of: Callable[[LayerEntry], Key]) -> dict[Key, float]:
    """Shares of the change, the largest first."""
    found: dict[Key, float] = {}
    for entry in entries:
        key = key_of(entry)
        found[key] = found.get(key, 0.0) + entry.change_share
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _share(entries: Sequence[LayerEntry]) -> str:
    return f"{math.fsum(entry.change_share for entry in entries):.1%}"


def _largest(entries: Sequence[LayerEntry]) -> str:
    shares = list(_shares(entries, lambda entry: entry.kind).items())
    more = f", {len(shares) - MOST_NAMED} more" if len(shares) > MOST_NAMED else ""
    return ", ".join(f"{kind} {share:.1%}" for kind, share in shares[:MOST_NAMED]) + more


def _half(shares: Mapping[Any, float]) -> int:
    """How few of them, the largest first, hold half of all."""
    sums = list(accumulate(shares.values()))
    return 1 + sum(partial < sums[-1] / 2 for partial in sums)
