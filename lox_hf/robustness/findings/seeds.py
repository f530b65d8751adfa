"""One figure over several seeds: its mean and spread, and how two models differ seed by seed."""

import math
import statistics
from collections.abc import Sequence

from lox_hf.evaluation.statistics import sign_flip_test
from lox_hf.records import SeedDifference, Spread


def spread(values: Sequence[float], at_least: int = 0) -> Spread:
    """Return values of several seeds with their mean and sample standard deviation.

    Args:
        values: A value per seed; NaN where it is not known.
        at_least: How many are lower bounds.

    Returns:
        The spread; mean and deviation are over the known values.

    Example:
        >>> spread([1.0, 3.0])
        Spread(values=(1.0, 3.0), mean=2.0, sd=1.4142135623730951, n=2, at_least=0)
    """
    known = [value for value in values if not math.isnan(value)]
    return Spread(
        values=tuple(values),
        mean=statistics.fmean(known) if known else math.nan,
        sd=statistics.stdev(known) if len(known) > 1 else math.nan,
        n=len(known),
        at_least=at_least,
    )


def seed_difference(ours: Sequence[float], theirs: Sequence[float], at_least: int = 0) -> SeedDifference:
    """Compare one figure of two models on the same seeds.

    Args:
        ours: A value per seed; NaN where it is not known or does not count.
        theirs: The same of the model to compare with.
        at_least: How many differences are lower bounds.

    Returns:
        ours - theirs, over the seeds on which both are known, with an exact sign-flip test.

    Raises:
        ValueError: If the two differ in length.

    Example:
        >>> found = seed_difference([8.0, 7.0, 9.0], [5.0, 5.0, 5.0])
        >>> found.difference.mean, found.higher, found.p_value
        (3.0, 3, 0.25)
    """
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    known = [difference for difference in differences if not math.isnan(difference)]
    return SeedDifference(
        difference=spread(differences, at_least),
        higher=sum(difference > 0 for difference in known),
        lower=sum(difference < 0 for difference in known),
        p_value=sign_flip_test(known),
    )
