"""The whole way by one command: what was chosen and why, and what came of it."""

from dataclasses import dataclass, field
from typing import Any, Self

from lox_hf.records.base import JsonRecord, ModelReference
from lox_hf.records.comparison import PairedDifference
from lox_hf.records.score import Score


@dataclass(frozen=True)
class Choice(JsonRecord):
    """Something that was settled without asking.

    Attributes:
        name: What, such as "base".
        value: What it came to.
        reason: Why, or where it stands; with the option that settles it otherwise.
    """

    name: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name:<8}  {self.value} ({self.reason})"


@dataclass(frozen=True)
class AutoPlan(JsonRecord):
    """What a run would do, found without measuring anything.

    Attributes:
        choices: What is settled.
        candidates: Hardenings that are tried.
        measured: Models that are measured at most.
        attacked: Models that are fine-tuned and measured along it at most.
        attack_steps: Optimiser steps of one attack; 0 without one.
        prompts: Prompts that a model is asked at each of these.
    """

    choices: tuple[Choice, ...]
    candidates: int
    measured: int
    attacked: int
    attack_steps: int
    prompts: int

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the plan with its choices."""
        return super().from_dict({**data, "choices": tuple(map(Choice.from_dict, data["choices"]))})


@dataclass(frozen=True)
class AutoModel(JsonRecord):
    """One model on the prompts that nothing was chosen by.

    Attributes:
        score: Before any attack.
        attacked: After the short attack; None where there is none.
    """

    score: Score
    attacked: Score | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the record with its scores."""
        attacked = data.get("attacked")
        return cls(Score.from_dict(data["score"]), Score.from_dict(attacked) if attacked else None)


@dataclass(frozen=True)
class AutoReport(JsonRecord):
    """What `auto_harden` did, and why.

    Attributes:
        aligned: The aligned model.
        base: The model before alignment.
        choices: What was settled without asking.
        checked: What decided whether hardening can help, on the prompts to choose by: scores of "aligned", "base" and
            "attacked", the aligned model after the short attack; only what was measured.
        stopped: Why nothing was hardened, in a sentence; empty where something was.
        config: Settings that were chosen, as `LoxConfig.to_dict` gives them; None where nothing was hardened.
        recommended: What the selection calls them.
        reasons: Why these, in sentences.
        before: The aligned model on the prompts to report on.
        after: The hardened model on the same prompts.
        differences: By rate what changed from the first to the second, prompt by prompt.
        attacked_differences: The same after the short attack on each.
        files: What was written, by what it is, relative to the run's folder.
        settings: Settings of the run.
        versions: Versions a result depends on.
        warnings: What a reader should know.

    Example:
        >>> report = AutoReport.from_json(Path("aligned-auto/report.json").read_text())  # doctest: +SKIP
        >>> report.recommended, report.attacked_differences["asr"].difference  # doctest: +SKIP
        ('r=2 alpha=0.75 attention', -0.41)
    """

    aligned: ModelReference
    base: ModelReference
    choices: tuple[Choice, ...]
    checked: dict[str, Score] = field(default_factory=dict)
    stopped: str = ""
    config: dict[str, Any] | None = None
    recommended: str = ""
    reasons: tuple[str, ...] = ()
    before: AutoModel | None = None
    after: AutoModel | None = None
    differences: dict[str, PairedDifference] = field(default_factory=dict)
    attacked_differences: dict[str, PairedDifference] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the report with its nested records."""
        nested = {
            "aligned": ModelReference.from_dict(data["aligned"]),
            "base": ModelReference.from_dict(data["base"]),
            "choices": tuple(map(Choice.from_dict, data["choices"])),
            "checked": {name: Score.from_dict(score) for name, score in data["checked"].items()},
            "reasons": tuple(data["reasons"]),
            "before": AutoModel.from_dict(data["before"]) if data["before"] else None,
            "after": AutoModel.from_dict(data["after"]) if data["after"] else None,
            "differences": _differences(data["differences"]),
            "attacked_differences": _differences(data["attacked_differences"]),
            "warnings": tuple(data["warnings"]),
        }
        return super().from_dict({**data, **nested})


def _differences(data: dict[str, Any]) -> dict[str, PairedDifference]:
    return {name: PairedDifference.from_dict(found) for name, found in data.items()}
