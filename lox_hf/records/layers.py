"""Where in a model the change lies that alignment made."""

import math
from dataclasses import dataclass
from typing import Any, Self

from lox_hf.records.base import JsonRecord, ModelReference


@dataclass(frozen=True)
class LayerEntry(JsonRecord):
    """One matrix.

    Attributes:
        name: Checkpoint name; one matrix of a stack reads `name[i]`.
        layer: Number of its layer; None outside the layers.
        kind: Its module's path without the layers' prefix and number, such as "self_attn.q_proj".
        shape: (m, n).
        change_share: ||dW||_F^2 of this matrix as a share of all matrices' together: where alignment acted.
        energy_share: Share of this matrix's own ||dW||_F^2 that its directions hold: how low its rank is.
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


@dataclass(frozen=True)
class LayerMap(JsonRecord):
    """The change that alignment made, matrix by matrix.

    Attributes:
        aligned: The aligned model.
        base: The model before alignment.
        entries: The matrices, in file order.
        r: Rank of the directions, as it was asked for; None is never one.
        tuned: The model whose retention was read; empty where none was.
    """

    aligned: ModelReference
    base: ModelReference | None
    entries: tuple[LayerEntry, ...]
    r: int | float
    tuned: str = ""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record with its nested records."""
        nested = {
            "aligned": ModelReference.from_dict(data["aligned"]),
            "base": ModelReference.from_dict(data["base"]) if data.get("base") else None,
            "entries": tuple(map(LayerEntry.from_dict, data["entries"])),
        }
        return super().from_dict({**data, **nested})
