"""Figures of a stress test in words, each with the seeds it holds for."""

import math
from collections.abc import Sequence
from typing import Literal

from lox_hf.records import AttackOutcome, SeedDifference, Spread

Role = Literal["aligned", "hardened", "control"]

ENOUGH_FOR_P = 6
"""With fewer seeds no test over them can give a p-value below 0.05."""


def kind(model: str) -> str:
    """Return what kind of model a name of the matrix stands for: its first word."""
    return model.partition(" ")[0]


def role(model: str) -> Role:
    """Tell from its name in the matrix what a model is there for; all but two kinds are controls.

    Args:
        model: Name of the model.

    Returns:
        Its role.

    Example:
        >>> role("hardened r=6 alpha=1.25"), role("random r=6 alpha=1.25")
        ('hardened', 'control')
    """
    if model == "aligned":
        return "aligned"
    return "hardened" if kind(model) == "hardened" else "control"


def seed_names(seeds: Sequence[int]) -> str:
    """Return seeds by name.

    Args:
        seeds: One at least.

    Returns:
        "seed 12", or "seeds 12, 13 and 14".
    """
    *first, last = map(str, seeds)
    return f"seeds {', '.join(first)} and {last}" if first else f"seed {last}"


def number(n: int, what: str) -> str:
    """Return a number of things: "1 seed", "2 seeds"."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def percent(share: float) -> str:
    """Return a share in per cent; NaN is "not known"."""
    return "not known" if math.isnan(share) else f"{100 * share:.0f} %"


def points(difference: float) -> str:
    """Return a difference of shares in points with its sign; NaN is "points not known"."""
    return "points not known" if math.isnan(difference) else f"{round(100 * difference):+d} points"


def steps(difference: float) -> str:
    """Return a difference in steps with its sign."""
    # Adding 0 takes the sign off a difference that rounds to it.
    return f"{round(difference, 1) + 0.0:+.1f} steps"


def bounded(figure: Spread, text: str) -> str:
    """Return a figure's mean in words with what it is a bound of: ">= 12.0 steps"."""
    return f"{figure.bound} {text}".strip()


def mean_where(figure: Spread, counted: SeedDifference) -> float:
    """Return the mean of a figure over the seeds on which a difference is known; NaN where there are none."""
    pairs = zip(figure.values, counted.difference.values, strict=True)
    known = [value for value, difference in pairs if not math.isnan(difference)]
    return math.fsum(known) / len(known) if known else math.nan


def against(ours: Spread, theirs: Spread, counted: SeedDifference) -> str:
    """Return two means over the same seeds: "33 % against 55 %"."""
    return f"{percent(mean_where(ours, counted))} against {percent(mean_where(theirs, counted))}"


def direction(found: SeedDifference) -> int:
    """Tell whether a difference is clear: most seeds agree, and none disagrees or the mean exceeds the deviation.

    Args:
        found: The difference.

    Returns:
        1 where the model's figure is clearly higher, -1 where it is clearly lower, 0 where neither is clear.

    Example:
        >>> from lox_hf.robustness.findings.seeds import seed_difference, spread
        >>> direction(seed_difference(spread([8.0, 7.0, 9.0]), spread([5.0, 5.0, 5.0])))
        1
    """
    difference = found.difference
    for sign, agreed, opposed in ((1, found.higher, found.lower), (-1, found.lower, found.higher)):
        most = 2 * agreed > difference.n and sign * difference.mean > 0
        if most and (not opposed or abs(difference.mean) > difference.sd):
            return sign
    return 0


def gained(outcome: AttackOutcome) -> bool:
    """Tell whether a model is clearly better than the aligned one in half-life or mean ASR, and clearly worse in none.

    Args:
        outcome: The model under an attack.

    Returns:
        Whether it is.
    """
    better = direction(outcome.half_life_gain), -direction(outcome.mean_asr_gain)
    return max(better) > 0 and min(better) >= 0


def agreement(found: SeedDifference, higher: str, lower: str) -> str:
    """Return how far the seeds agree on a difference, and whether it is clear.

    Args:
        found: The difference.
        higher: What a higher figure is called: "later".
        lower: What a lower one is called: "sooner".

    Returns:
        "later on 3 of 3 seeds", or "no clear difference: later on 1, sooner on 2 of 3 seeds".
    """
    n = number(found.difference.n, "seed")
    sign = direction(found)
    if sign:
        return f"{higher if sign > 0 else lower} on {found.higher if sign > 0 else found.lower} of {n}{p_value(found)}"
    return f"no clear difference: {higher} on {found.higher}, {lower} on {found.lower} of {n}{p_value(found)}"


def later(found: SeedDifference) -> str:
    """Return on how many seeds a step is later: "later on 5, sooner on 1 of 6 seeds"."""
    return f"later on {found.higher}, sooner on {found.lower} of {number(found.difference.n, 'seed')}"


def lower(found: SeedDifference) -> str:
    """Return on how many seeds a rate is lower: "lower on 5, higher on 1 of 6 seeds"."""
    return f"lower on {found.lower}, higher on {found.higher} of {number(found.difference.n, 'seed')}"


def p_value(found: SeedDifference) -> str:
    """Return the test over seeds, to stand behind a count: ", p 0.031"; nothing for fewer seeds than can tell."""
    return f", p {found.p_value:.2g}" if found.difference.n >= ENOUGH_FOR_P else ""
