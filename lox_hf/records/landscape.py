"""A measure over the plane that models span."""

import math
from dataclasses import dataclass, field
from typing import Any, Self

from lox_hf.records.base import JsonRecord
from lox_hf.records.score import Score


@dataclass(frozen=True)
class PlacedModel(JsonRecord):
    """Where a model lies.

    Attributes:
        name: Its folder or Hub id.
        x: Coordinate along the first axis: <W - W_1, e_1>.
        y: Coordinate along the second; 0 on a line.
        beside: Distance of the model from the plane (or line), ||W - W_1 - x e_1 - y e_2||_F; 0 for those that span
            it. The measure at (x, y) is not this model's where it is large.
        score: What was measured of the model itself.
    """

    name: str
    x: float
    y: float
    beside: float = 0.0
    score: Score = field(default_factory=Score)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record with its score."""
        return super().from_dict({**data, "score": Score.from_dict(data["score"])})


@dataclass(frozen=True)
class GridPoint(JsonRecord):
    """What was measured at one point: W_1 + x e_1 + y e_2.

    Attributes:
        x: Coordinate along the first axis.
        y: Coordinate along the second.
        score: What was measured.
    """

    x: float
    y: float
    score: Score

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the point with its score."""
        return super().from_dict({**data, "score": Score.from_dict(data["score"])})


@dataclass(frozen=True)
class Basin(JsonRecord):
    """How safe the neighbourhood of a model is, over the points of the grid within a radius.

    Attributes:
        measure: The rate that is read, such as "asr".
        center: Name of the model in the middle.
        radius: Points within this distance in both coordinates are in it.
        n_points: How many points are.
        visage: VISAGE: mean of S_max - S over the points with S < S_max, in points of 100 (S the attack success rate
            in percent, S_max = 100): higher is safer. NaN where no point counts.
        mean_fall: Mean rise of the rate over the center's, in points of 100: what a move inside costs on average.
        worst: Highest rate within.

    Source: Peng et al., Navigating the Safety Landscape, NeurIPS 2024, arXiv 2405.17374 (VISAGE).
    """

    measure: str
    center: str
    radius: float
    n_points: int
    visage: float = math.nan
    mean_fall: float = math.nan
    worst: float = math.nan


@dataclass(frozen=True)
class Landscape(JsonRecord):
    """A measure over a grid on the plane (or line) that models span.

    Attributes:
        models: The models, in the order in which they were named; the first is the origin.
        xs: Grid along the first axis, in units of weight space (Frobenius norm of all parameters).
        ys: Grid along the second; (0,) on a line.
        points: By y within x: all of ys at xs[0] first.
        parameters: Parameters that take part.
        basins: Neighbourhoods of models.
        versions: Versions a result depends on.
        warnings: What a reader should know.

    Example:
        >>> found = Landscape.from_json(Path("landscape/landscape.json").read_text())  # doctest: +SKIP
        >>> [(model.name, model.x, model.y) for model in found.models]  # doctest: +SKIP

    Source: Perin et al., COLM 2025 (safety landscape); the reference's safety/safety_landscape.py.
    """

    models: tuple[PlacedModel, ...]
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    points: tuple[GridPoint, ...]
    parameters: int
    basins: tuple[Basin, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record with its nested records."""
        nested = {
            "models": tuple(map(PlacedModel.from_dict, data["models"])),
            "xs": tuple(data["xs"]),
            "ys": tuple(data["ys"]),
            "points": tuple(map(GridPoint.from_dict, data["points"])),
            "basins": tuple(map(Basin.from_dict, data.get("basins", ()))),
            "warnings": tuple(data.get("warnings", ())),
        }
        return super().from_dict({**data, **nested})
