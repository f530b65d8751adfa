"""What every record can do, and the record of which model is meant."""

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Self


@dataclass(frozen=True)
class JsonRecord:
    """JSON both ways for a frozen dataclass. NaN is written as null, infinity as "inf"."""

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain dicts, lists and numbers."""
        return asdict(self)

    def to_json(self) -> str:
        """Return the record as strict JSON, indented by two."""
        return json.dumps(_strict(self.to_dict()), indent=2) + "\n"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record from `to_dict`'s output; fields of newer versions are ignored."""
        types = {item.name: item.type for item in fields(cls)}
        known = {name: value for name, value in data.items() if name in types}
        return cls(**{name: _number(value) if types[name] is float else value for name, value in known.items()})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Build the record from `to_json`'s output."""
        return cls.from_dict(json.loads(text))


@dataclass(frozen=True)
class ModelReference(JsonRecord):
    """Which model: as it was named, and the commit it was resolved to.

    Attributes:
        name_or_path: Hub id, folder, or a description of a model in memory.
        revision: Commit hash on the Hub; None for folders and models in memory.

    Example:
        >>> from lox_hf import ModelReference
        >>> ModelReference("meta-llama/Llama-2-7b-hf", "01c7f73").to_dict()
        {'name_or_path': 'meta-llama/Llama-2-7b-hf', 'revision': '01c7f73'}
    """

    name_or_path: str
    revision: str | None = None


def _strict(value: Any) -> Any:
    """Numbers that JSON does not know, in forms it does."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
