"""A grid of hardenings, what each costs and brings, and which one to take."""

import math
from dataclasses import dataclass, field
from typing import Any, Self

from lox_hf.records.base import JsonRecord, ModelReference
from lox_hf.records.score import Score


@dataclass(frozen=True)
class Limit(JsonRecord):
    """How far a measure may move from the aligned model's.

    Attributes:
        measure: Name of the rate or figure, such as "over_refusal".
        most: Largest change that is allowed: of a rate the difference of shares (0.02 is 2 points), of a figure the
            difference itself, or with `relative` its share of the aligned model's.
        higher_is_worse: Whether a rise is what costs; for an accuracy a fall is.
        relative: Whether `most` is a share of the aligned model's figure.

    Example:
        >>> Limit("over_refusal", 0.02).relative  # 2 points more at most
        False
    """

    measure: str
    most: float
    higher_is_worse: bool = True
    relative: bool = False


@dataclass(frozen=True)
class Candidate(JsonRecord):
    """One hardening that was tried.

    Attributes:
        name: What tables call it, such as "r=6 alpha=1.25 all".
        config: Settings, as `LoxConfig.to_dict` gives them.
        targets: Which weights, by the word that was asked for, such as "attention".
        strength: Size of the edit, alpha * ||Proj_r(dW)||_F over all edited matrices as a share of ||dW||_F of all
            that no setting excludes.
        score: What was measured of it before any attack.
        attacked: What was measured of it after the short attack; None where it was not attacked.
        broken: Limits that it breaks, in words; empty where it keeps all of them.
        uncertain: Limits that it keeps by what was measured, but may break at 95 %, in words.
        on_front: Whether no other candidate is at least as good in everything that is compared and better in one.
    """

    name: str
    config: dict[str, Any]
    targets: str
    strength: float
    score: Score
    attacked: Score | None = None
    broken: tuple[str, ...] = ()
    uncertain: tuple[str, ...] = ()
    on_front: bool = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the candidate with its scores."""
        nested = {
            "score": Score.from_dict(data["score"]),
            "attacked": Score.from_dict(data["attacked"]) if data.get("attacked") else None,
            "broken": tuple(data.get("broken", ())),
            "uncertain": tuple(data.get("uncertain", ())),
        }
        return super().from_dict({**data, **nested})


@dataclass(frozen=True)
class Selection(JsonRecord):
    """The candidates side by side, and the one that is recommended.

    Attributes:
        aligned: The aligned model.
        base: The model before alignment.
        aligned_score: What was measured of the aligned model.
        aligned_attacked: The same after the short attack; None where nothing was attacked.
        candidates: All that were tried, in the order of the grid.
        limits: What a recommendation may cost.
        objective: The measure that decides among those that keep the limits: a name of `Candidate.attacked`, or
            "strength" where nothing was attacked.
        recommended: Name of the candidate to take; None where none keeps the limits, or none is any better after the
            attack than the aligned model.
        reasons: Why, in sentences.
        versions: Versions a result depends on.
        warnings: What a reader should know.

    Example:
        >>> selection = Selection.from_json(Path("select/selection.json").read_text())  # doctest: +SKIP
        >>> selection.recommended  # doctest: +SKIP
        'r=6 alpha=0.75 attention'
    """

    aligned: ModelReference
    base: ModelReference | None
    aligned_score: Score
    candidates: tuple[Candidate, ...]
    limits: tuple[Limit, ...]
    objective: str
    aligned_attacked: Score | None = None
    recommended: str | None = None
    reasons: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def get(self, name: str) -> Candidate:
        """Return a candidate by its name.

        Raises:
            KeyError: If there is none.
        """
        return {candidate.name: candidate for candidate in self.candidates}[name]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record with its nested records."""
        attacked = data.get("aligned_attacked")
        nested = {
            "aligned": ModelReference.from_dict(data["aligned"]),
            "base": ModelReference.from_dict(data["base"]) if data.get("base") else None,
            "aligned_score": Score.from_dict(data["aligned_score"]),
            "aligned_attacked": Score.from_dict(attacked) if attacked else None,
            "candidates": tuple(map(Candidate.from_dict, data["candidates"])),
            "limits": tuple(map(Limit.from_dict, data["limits"])),
            "reasons": tuple(data.get("reasons", ())),
            "warnings": tuple(data.get("warnings", ())),
        }
        return super().from_dict({**data, **nested})


@dataclass(frozen=True)
class DivergenceReport(JsonRecord):
    """How far a model's answers are from another's: KL divergence of the next token, over harmless prompts.

    Attributes:
        kl: Mean over prompts of the mean over positions of KL(reference || model), in nats.
        low: Lower end of its 95 % interval over prompts.
        high: Upper end.
        prompts: Prompts.
        tokens: Positions in all.
        sha256: SHA-256 of the prompts.

    Example:
        >>> print(f"{divergence(hardened, reference).kl:.3f} nats")  # doctest: +SKIP
        0.013 nats
    """

    kl: float
    low: float = math.nan
    high: float = math.nan
    prompts: int = 0
    tokens: int = 0
    sha256: str = ""
