"""Safety of the base model with more and more of the change that alignment made."""

import math
from dataclasses import dataclass, field
from typing import Any, Self

from lox_hf.records.base import JsonRecord, ModelReference
from lox_hf.records.score import Score


@dataclass(frozen=True)
class CurvePoint(JsonRecord):
    """W_base + Proj_r(dW) at one rank.

    Attributes:
        r: Directions of every matrix; 0 is the base.
        energy_share: Share of the change's energy that they hold, over all matrices; 0 for r = 0.
        score: What was measured.
    """

    r: int
    energy_share: float
    score: Score

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the point with its score."""
        return super().from_dict({**data, "score": Score.from_dict(data["score"])})


@dataclass(frozen=True)
class EffectiveRank(JsonRecord):
    """How many directions carry the safety, by the paper's rule and with its uncertainty.

    Attributes:
        measure: The rate it is read from, such as "asr".
        rho: How far above the aligned model's rate counts as equal, as a share; the paper's is 0.01.
        by_rule: Smallest measured r whose rate is less than rho above the aligned model's; None where none is.
        certain: Smallest measured r whose rate is not above it by more than rho at 95 % (one-sided); None where none
            is, which is no evidence of anything.
        upper_limits: By r, as text: the 95 % one-sided upper limit of its rate less the aligned model's.
        paired: Whether prompts were compared one by one.
        n: Prompts that were compared; the smallest number over the ranks.
        least_n: Prompts it takes at least to be certain of rho, where not one answer changes.
        words: What this says, in sentences.
    """

    measure: str
    rho: float
    by_rule: int | None
    certain: int | None
    upper_limits: dict[str, float]
    paired: bool
    n: int
    least_n: int
    words: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record."""
        limits = {r: math.nan if limit is None else float(limit) for r, limit in data["upper_limits"].items()}
        return super().from_dict({**data, "upper_limits": limits, "words": tuple(data["words"])})


@dataclass(frozen=True)
class RankCurve(JsonRecord):
    """A measure of base + Proj_r(dW) at several ranks, and of the aligned model.

    Attributes:
        aligned: The aligned model.
        base: The model before alignment.
        config: Settings of the decomposition, as `LoxConfig.to_dict` gives them.
        points: By rank, ascending.
        aligned_score: What was measured of the aligned model itself, which has the whole change.
        matrices: Number of matrices that were taken back to their base.
        reset_vectors: Whether at r = 0 weights with fewer than two dims were the base's too.
        effective: The effective rank; None where the measure is no rate.
        about: Settings of the measure, as its owner gave them.
        versions: Versions a result depends on.
        warnings: What a reader should know.

    Example:
        >>> curve = RankCurve.from_json(Path("curve/rank_curve.json").read_text())  # doctest: +SKIP
        >>> [(point.r, point.score.value("asr")) for point in curve.points]  # doctest: +SKIP
        [(0, 0.98), (1, 0.04), (2, 0.0)]

    Source: Perin et al., COLM 2025, section 3 (effective rank); the reference's safety/effective_rank.py.
    """

    aligned: ModelReference
    base: ModelReference | None
    config: dict[str, Any]
    points: tuple[CurvePoint, ...]
    aligned_score: Score
    matrices: int
    reset_vectors: bool = False
    effective: EffectiveRank | None = None
    about: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record with its nested records."""
        nested = {
            "aligned": ModelReference.from_dict(data["aligned"]),
            "base": ModelReference.from_dict(data["base"]) if data.get("base") else None,
            "points": tuple(map(CurvePoint.from_dict, data["points"])),
            "aligned_score": Score.from_dict(data["aligned_score"]),
            "effective": EffectiveRank.from_dict(data["effective"]) if data.get("effective") else None,
            "warnings": tuple(data.get("warnings", ())),
        }
        return super().from_dict({**data, **nested})
