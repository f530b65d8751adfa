"""Figures of a stress test in words, each with the seeds it holds for."""

import math
from collections.abc import Sequence

from lox_hf.records import SeedDifference, Spread


def kind(model: str) -> str:
    """Return what kind of model a name of the matrix stands for: its first word."""
    return model.partition(" ")[0]


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


def mean_where(figure: Spread, counted: SeedDifference) -> float:
    """Return the mean of a figure over the seeds on which a difference is known; NaN where there are none."""
    pairs = zip(figure.values, counted.difference.values, strict=True)
    known = [value for value, difference in pairs if not math.isnan(difference)]
    return math.fsum(known) / len(known) if known else math.nan


def against(ours: Spread, theirs: Spread, counted: SeedDifference) -> str:
    """Return two means over the same seeds: "33 % against 55 %"."""
    return f"{percent(mean_where(ours, counted))} against {percent(mean_where(theirs, counted))}"


def later(found: SeedDifference) -> str:
    """Return on how many seeds a step is later: "later on 5, sooner on 1 of 6 seeds"."""
    return f"later on {found.higher}, sooner on {found.lower} of {number(found.difference.n, 'seed')}"


def lower(found: SeedDifference) -> str:
    """Return on how many seeds a rate is lower: "lower on 5, higher on 1 of 6 seeds"."""
    return f"lower on {found.lower}, higher on {found.higher} of {number(found.difference.n, 'seed')}"


def p_value(found: SeedDifference) -> str:
    """Return the test over seeds, to stand behind a count: ", p 0.031"; nothing for a single seed."""
    return f", p {found.p_value:.2g}" if found.difference.n > 1 else ""
