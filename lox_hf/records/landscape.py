"""A measure over the plane that models span."""

import math
from dataclasses import dataclass, field
from typing import Any, Self

from lox_hf.records.base import JsonRecord
from lox_hf.records.score import Score

FAR = 0.1
"""A model that lies further beside the plane than this share of its distance from the origin is marked as such."""


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

    @property
    def distance(self) -> float:
        """Its distance from the origin, the first model, in all directions."""
        return math.hypot(self.x, self.y, self.beside)

    @property
    def is_beside(self) -> bool:
        """Whether it is so far beside the plane that its place there is a projection, and not itself."""
        return self.beside > FAR * self.distance

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
    """How safe the neighbourhood of a model is, over the points of the grid that lie in it.

    Peng et al. move a model along random directions, a share of every layer's norm far; here the neighbourhood is a
    square of the plane (a piece of the line) that the models span, cut off where the grid ends. So VISAGE here
    compares models of one landscape; it is none of the figures of their paper.

    Attributes:
        measure: The rate that is read, such as "asr": lower is safer.
        center: Name of the model in the middle; one beside the plane has its projection there.
        radius: Points within this distance in both coordinates are in it.
        n_points: How many of them have a rate.
        visage: VISAGE: mean of S_max - S over the points with S < S_max, where S is the rate in percent and S_max is
            100: higher is safer. NaN where no point counts.
        mean_fall: How far the rate is above the center's own, in points of 100, on average over the points: the mean
            fall of safety by a move inside.
        worst: Highest rate within, as a share.

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
        measure: What is drawn, by its name in the scores, such as "asr".
        about: How was measured, as JSON values.
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
    measure: str = "asr"
    about: dict[str, Any] = field(default_factory=dict)
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
