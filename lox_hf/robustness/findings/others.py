"""The controls and further hardened models under an attack, in a line: does the gain speak for LoX?"""

from collections.abc import Sequence

from lox_hf.records import AttackOutcome, StressReport
from lox_hf.robustness.findings.seeds import TIE_STEPS, seed_difference
from lox_hf.robustness.findings.wording import agreement, bounded, gained, kind, points, role, steps

MATCHED = ("random", "rescaled", "retrained", "refusal-matched")
"""Controls that share with LoX what might explain a gain without it."""


def others(ours: AttackOutcome | None, rest: Sequence[AttackOutcome], report: StressReport) -> list[str]:
    """Say what the controls and further hardened models gained under the same attack.

    Args:
        ours: The hardened model that is spoken of; None where there is none.
        rest: All others but the aligned model.
        report: Their report.

    Returns:
        One line, or none where nothing else was run.
    """
    controls = [other for other in rest if role(other.model) == "control"]
    uncounted = [other.model for other in rest if not other.mean_asr_gain.difference.n]
    counted = [other for other in rest if other.model not in uncounted]
    without = [other.model for other in counted if other in controls and not gained(other)]
    told = [other for other in counted if other.model not in without]
    parts = [f"No gain by {', '.join(without)}."] * bool(without)
    parts += [f"Others: {'; '.join(map(_short, told))}."] * bool(told)
    parts += [f"No seed counts of {', '.join(uncounted)}."] * bool(uncounted)
    if ours is not None and gained(ours):
        parts += _as_good([control for control in counted if control in controls and _level(control, ours)])
    if ours is not None:
        parts += _against_matched(ours, controls, report)
    return [" ".join(parts)] if parts else []


def _short(other: AttackOutcome) -> str:
    half, asr = other.half_life_gain.difference, points(other.mean_asr_gain.difference.mean)
    return f"{other.model} {bounded(half, steps(half.mean))}, {asr}" if half.n else f"{other.model} {asr}"


def _level(control: AttackOutcome, ours: AttackOutcome) -> bool:
    """Whether a control is as good on average, in one of the two figures at least, on the seeds that both have."""
    half = seed_difference(control.half_life, ours.half_life, TIE_STEPS).difference.mean
    asr = seed_difference(control.mean_asr, ours.mean_asr).difference.mean
    return half >= 0 or asr <= 0


def _as_good(level: Sequence[AttackOutcome]) -> list[str]:
    """What a control that is as good means depends on what it is."""
    lines = []
    if matched := [control.model for control in level if kind(control.model) in MATCHED]:
        lines.append(f"As good as LoX: {', '.join(matched)}, so the gain is no evidence for LoX.")
    if expo := [control.model for control in level if kind(control.model) == "expo"]:
        lines.append(f"As good at full rank: {', '.join(expo)}, so the low rank is not what matters.")
    if any(kind(control.model) == "safeinst" for control in level):
        lines.append("As good: safeinst, another defence.")
    return lines


def _against_matched(ours: AttackOutcome, controls: Sequence[AttackOutcome], report: StressReport) -> list[str]:
    """The fairest control: aligned until it refuses as many harmless prompts as this hardened model."""
    names = {f"refusal-matched{ours.model.removeprefix('hardened')}", "refusal-matched"}
    other = next((control for control in controls if control.model in names), None)
    if other is None:
        return []
    if any(note.startswith(f"{other.model},") and "NOT matched" in note for note in report.notes):
        return [f"{other.model} was not brought to refuse as many: extra refusal is not ruled out."]
    half = seed_difference(ours.half_life, other.half_life, TIE_STEPS)
    if not half.difference.n:
        return []
    return [
        f"Against {other.model}, trained to refuse as many: {bounded(half.difference, steps(half.difference.mean))}, "
        f"{agreement(half, 'later', 'sooner')}."
    ]
