"""Two scores of models that were asked the same, rate by rate and prompt by prompt."""

from lox_hf.records import PairedDifference, Score
from lox_hf.records.score import UNKNOWN, YES
from lox_hf.statistics import paired_difference


def score_differences(before: Score, after: Score) -> dict[str, PairedDifference]:
    """Compare every rate of which both scores have the marks; what one of them does not know is left out.

    Args:
        before: The first model, such as the aligned one.
        after: The second, on the same prompts.

    Returns:
        By rate the difference with its interval and exact McNemar test, as `lox_hf.compare` gives it of two reports.

    Example:
        >>> from lox_hf.statistics import rate
        >>> aligned, hardened = (Score({"asr": rate(n, 8)}, marks={"asr": "1" * n + "0" * (8 - n)}) for n in (8, 2))
        >>> print(score_differences(aligned, hardened)["asr"])
        -75.0 points [-100.0, -37.5], p 0.031, 8 pairs
    """
    names = [name for name in before.marks if len(before.marks[name]) == len(after.marks.get(name, ""))]
    return {name: _difference(before.marks[name], after.marks[name]) for name in names}


def _difference(before: str, after: str) -> PairedDifference:
    known = [pair for pair in zip(before, after, strict=True) if UNKNOWN not in pair]
    return paired_difference([first == YES for first, _ in known], [second == YES for _, second in known])
