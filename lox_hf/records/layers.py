"""Where in a model the change lies that alignment made."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, TypeVar

from lox_hf.records.base import JsonRecord, ModelReference

Key = TypeVar("Key")


@dataclass(frozen=True)
class LayerEntry(JsonRecord):
    """One matrix.

    Attributes:
        name: Checkpoint name; one matrix of a stack reads `name[i]`.
        layer: Number of its layer; None outside the layers.
        kind: Its module's path without the layers' prefix and numbers, such as "self_attn.q_proj"; the experts of a
            layer are of one kind. In a model with several stacks of layers it begins with its stack.
        shape: (m, n).
        change_share: ||dW||_F^2 of this matrix as a share of all matrices' together: where alignment acted.
        energy_share: Share of this matrix's own ||dW||_F^2 that its directions hold: how low its rank is. NaN where
            it did not change.
        singular_values: s_1 ... s_k, descending.
        retention: Retention of another model's matrix, where one was read; NaN otherwise.
    """

    name: str
    layer: int | None
    kind: str
    shape: tuple[int, int]
    change_share: float
    energy_share: float
    singular_values: tuple[float, ...] = ()
    retention: float = math.nan

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record; lists become tuples again."""
        lists = {"shape": tuple(data["shape"]), "singular_values": tuple(data.get("singular_values", ()))}
        return super().from_dict({**data, **lists})


class LayerSummary(NamedTuple):
    """Several matrices taken together.

    Attributes:
        matrices: How many.
        change_share: Sum of their shares of the change.
        energy_share: Share of their ||dW||_F^2 that the directions hold; NaN where none changed.
        s_1: Largest singular value; NaN where none changed.
        retention: Retention of all together, each matrix weighted by its ||S_k||^2; NaN where none was read.
    """

    matrices: int
    change_share: float
    energy_share: float
    s_1: float
    retention: float

    @classmethod
    def of(cls, entries: Iterable[LayerEntry]) -> Self:
        """Take matrices together."""
        found = list(entries)
        changed = [(entry.energy_share, entry.change_share) for entry in found]
        read = [(entry.retention, math.fsum(s * s for s in entry.singular_values)) for entry in found]
        return cls(
            len(found),
            math.fsum(entry.change_share for entry in found),
            _weighted(changed),
            max((entry.singular_values[0] for entry in found if entry.singular_values), default=math.nan),
            _weighted(read),
        )


@dataclass(frozen=True)
class LayerMap(JsonRecord):
    """The change that alignment made, matrix by matrix.

    Attributes:
        aligned: The aligned model.
        base: The model before alignment.
        entries: The matrices, in file order.
        r: Rank of the directions, as it was asked for; None is never one.
        tuned: The model whose retention was read; empty where none was.

    Example:
        >>> found = LayerMap.from_json(Path("layers/layers.json").read_text())  # doctest: +SKIP
        >>> found.by_kind()["self_attn.v_proj"].energy_share  # doctest: +SKIP
        0.83
    """

    aligned: ModelReference
    base: ModelReference | None
    entries: tuple[LayerEntry, ...]
    r: int | float
    tuned: str = ""

    def cells(self) -> dict[tuple[str, int | None], LayerSummary]:
        """Take together what is of one kind in one layer."""
        return self._together(lambda entry: (entry.kind, entry.layer))

    def by_kind(self) -> dict[str, LayerSummary]:
        """Take together what is of one kind, over all layers; kinds in file order, those outside the layers last."""
        found = self._together(lambda entry: entry.kind)
        outside = {entry.kind for entry in self.entries if entry.layer is None}
        return {kind: found[kind] for kind in sorted(found, key=lambda kind: kind in outside)}

    def by_layer(self) -> dict[int | None, LayerSummary]:
        """Take together what is in one layer, in their order; what is outside the layers comes last, as None."""
        found = self._together(lambda entry: entry.layer)
        return {layer: found[layer] for layer in sorted(found, key=lambda layer: (layer is None, layer or 0))}

    def _together(self, key_of: Callable[[LayerEntry], Key]) -> dict[Key, LayerSummary]:
        groups: dict[Key, list[LayerEntry]] = {}
        for entry in self.entries:
            groups.setdefault(key_of(entry), []).append(entry)
        return {key: LayerSummary.of(group) for key, group in groups.items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record with its nested records."""
        nested = {
            "aligned": ModelReference.from_dict(data["aligned"]),
            "base": ModelReference.from_dict(data["base"]) if data.get("base") else None,
            "entries": tuple(map(LayerEntry.from_dict, data["entries"])),
        }
        return super().from_dict({**data, **nested})


def _weighted(pairs: Iterable[tuple[float, float]]) -> float:
    """Weighted mean of what is known; NaN where nothing is."""
    known = [(value, weight) for value, weight in pairs if not math.isnan(value) and weight > 0]
    total = math.fsum(weight for _, weight in known)
    return math.fsum(value * weight for value, weight in known) / total if known else math.nan
