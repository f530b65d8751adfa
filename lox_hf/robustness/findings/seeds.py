"""One figure over several seeds: its mean and spread, and how two models differ seed by seed."""

import math
import statistics
from collections.abc import Sequence

from lox_hf.records import SeedDifference, Spread
from lox_hf.statistics import sign_flip_test

TIE_STEPS, TIE_SHARE = 0.05, 0.005
"""Differences below these print as 0 and are ties: 0.05 steps, 0.5 points."""
_OPPOSITE = {"": "", ">=": "<=", "<=": ">="}


def spread(values: Sequence[float], bounds: Sequence[str] = ()) -> Spread:
    """Return values of several seeds with their mean and sample standard deviation.

    Args:
        values: A value per seed; NaN where it is not known.
        bounds: Per seed ">=" or "<=" where the value is only a bound, else "".

    Returns:
        The spread; mean and deviation are over the known values.

    Example:
        >>> spread([1.0, 3.0])
        Spread(values=(1.0, 3.0), mean=2.0, sd=1.4142135623730951, n=2, bounds=())
    """
    known = [value for value in values if not math.isnan(value)]
    return Spread(
        values=tuple(values),
        mean=statistics.fmean(known) if known else math.nan,
        sd=statistics.stdev(known) if len(known) > 1 else math.nan,
        n=len(known),
        bounds=tuple(bounds) if any(bounds) else (),
    )


def seed_difference(ours: Spread, theirs: Spread, tie: float = TIE_SHARE) -> SeedDifference:
    """Compare one figure of two models on the same seeds.

    Args:
        ours: The figure; NaN on a seed where it is not known or does not count.
        theirs: The same of the model to compare with.
        tie: A difference below it counts as none.

    Returns:
        ours - theirs, over the seeds on which both are known, with an exact sign-flip test. Where only ours is a lower
        bound the difference is one, where only theirs is it is an upper bound, where both are it is not known.

    Raises:
        ValueError: If the two differ in length.

    Example:
        >>> found = seed_difference(spread([8.0, 7.0, 9.0]), spread([5.0, 5.0, 5.0]))
        >>> found.difference.mean, found.higher, found.p_value
        (3.0, 3, 0.25)
    """
    bounds = [(one, _OPPOSITE[other]) for one, other in zip(_bounds(ours), _bounds(theirs), strict=True)]
    # A lower bound less a lower bound bounds nothing.
    differences = [
        math.nan if "" not in signs and signs[0] != signs[1] else one - other
        for one, other, signs in zip(ours.values, theirs.values, bounds, strict=True)
    ]
    signs = ["" if math.isnan(d) else one or other for d, (one, other) in zip(differences, bounds, strict=True)]
    known = [0.0 if abs(difference) < tie else difference for difference in differences if not math.isnan(difference)]
    return SeedDifference(
        difference=spread(differences, signs),
        higher=sum(difference > 0 for difference in known),
        lower=sum(difference < 0 for difference in known),
        p_value=sign_flip_test(known),
    )


def _bounds(figure: Spread) -> tuple[str, ...]:
    return figure.bounds or ("",) * len(figure.values)
