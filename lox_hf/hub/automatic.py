"""What `lox-hf auto` measured, as evidence: its held-out half of the prompts is one set like others."""

import math
from dataclasses import dataclass
from typing import Any

from lox_hf.records import (
    AutoModel,
    AutoReport,
    ModelReference,
    PairedDifference,
    Rate,
    SafetyComparison,
    SafetyReport,
)

HELD_OUT = "the half of the prompts that nothing was chosen by"
RATES = ("asr", "refusal", "over_refusal", "degenerate", "strict_asr", "accuracy")
NOTHING = Rate(0, 0, math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class SafetyEvidence:
    """Safety on one set of prompts by one judge.

    Attributes:
        before: The aligned model's report.
        after: The hardened model's.
        comparison: Both, prompt by prompt.
    """

    before: SafetyReport | None = None
    after: SafetyReport | None = None
    comparison: SafetyComparison | None = None


def safety_evidence(report: AutoReport) -> SafetyEvidence:
    """Return the safety that was measured before any attack, of the aligned and of the hardened model.

    Args:
        report: The report; one that stopped early holds none.

    Returns:
        Both sides and their comparison, prompt by prompt.

    Example:
        >>> safety_evidence(AutoReport.from_json(text)).after.asr.share  # doctest: +SKIP
        0.0
    """
    if report.before is None or report.after is None:
        return SafetyEvidence()
    rates: dict[str, Any] = {name: report.differences.get(name, PairedDifference(NOTHING, NOTHING)) for name in RATES}
    return SafetyEvidence(
        _side(report, report.before, report.aligned),
        _side(report, report.after, None),
        SafetyComparison(**rates, models=(report.aligned.name_or_path, "")),
    )


def _side(report: AutoReport, model: AutoModel, reference: ModelReference | None) -> SafetyReport:
    asked = dict(report.settings.get("reporting", {}))
    count, _, sha256 = str(asked.get("prompts", "")).partition(", sha256 ")
    judge = str(asked.get("judge", ""))
    rates: dict[str, Any] = {name: model.score.rates.get(name, NOTHING) for name in RATES}
    return SafetyReport(
        **rates,
        judge=judge,
        over_refusal_judge=judge,
        model=reference,
        prompts={"name": HELD_OUT, "n": int(count) if count.isdigit() else 0, "sha256": sha256},
        generation={name: asked[name] for name in ("template", "max_new_tokens", "system_prompt") if name in asked},
    )
