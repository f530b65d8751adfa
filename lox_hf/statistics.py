"""Rates with intervals, paired tests, agreement: the statistics of this package, done by scipy."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from lox_hf.records import PairedDifference, Rate, Score
from lox_hf.records.score import UNKNOWN, YES

if TYPE_CHECKING:
    import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 9999
Z_ONE_SIDED = 1.6448536269514722
"""95 % quantile of the normal distribution."""


class UpperLimit(NamedTuple):
    """How far a rate may have risen.

    Attributes:
        limit: 95 % one-sided upper limit of the rate after less the rate before; NaN where nothing was compared.
        n: Pairs that were compared; of two that are not paired, the smaller number.
        paired: Whether the same things were compared one by one.
    """

    limit: float
    n: int
    paired: bool


def rate(count: int, n: int, unscored: int = 0) -> Rate:
    """Return the share of `count` in `n` with its 95 % Wilson score interval.

    Args:
        count: How many have the property.
        n: How many were scored.
        unscored: How many more have no verdict.

    Returns:
        The rate; share and interval are NaN where n is 0.

    Example:
        >>> found = rate(0, 144)
        >>> found.share, found.low, round(found.high, 4)
        (0.0, 0.0, 0.026)
    """
    if n == 0:
        return Rate(count, n, math.nan, math.nan, math.nan, unscored)
    from scipy.stats import binomtest

    interval = binomtest(count, n).proportion_ci(CONFIDENCE, method="wilson")
    # At 0 and n one end is the share itself; rounding can leave it an ulp beside.
    low = 0.0 if count == 0 else float(interval.low)
    high = 1.0 if count == n else float(interval.high)
    return Rate(count, n, count / n, low, high, unscored)


def paired_difference(before: Sequence[bool], after: Sequence[bool], seed: int = 0) -> PairedDifference:
    """Compare one property of the same things before and after.

    The exact McNemar test asks whether as many gained it as lost it: of the pairs that changed, the gained ones are
    binomial with 1/2 where nothing but chance changed them. The interval is the percentile interval of a bootstrap
    that draws whole pairs.

    Args:
        before: The property, for every pair.
        after: The same afterwards.
        seed: Seed of the bootstrap; no global seed is touched.

    Returns:
        The difference; NaN where there are no pairs.

    Raises:
        ValueError: If the two differ in length.

    Example:
        >>> found = paired_difference([True] * 8 + [False] * 2, [False] * 10)
        >>> found.difference, found.lost, round(found.p_value, 4)
        (-0.8, 8, 0.0078)

    Source: McNemar, Psychometrika 12, 1947; Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    pairs = list(zip(before, after, strict=True))
    n = len(pairs)
    rates = rate(sum(before), n), rate(sum(after), n)
    if n == 0:
        return PairedDifference(*rates)
    from scipy.stats import binomtest

    gained = sum(b < a for b, a in pairs)
    lost = sum(b > a for b, a in pairs)
    p_value = float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0
    low, high = _bootstrap(gained, lost, n, seed)
    return PairedDifference(*rates, (gained - lost) / n, low, high, p_value, gained, lost)


def score_upper_limit(before: Score, after: Score, name: str) -> UpperLimit:
    """Return how far a rate of one model may lie above another's, at 95 %.

    Args:
        before: What was measured of the first.
        after: Of the second.
        name: The rate, such as "asr".

    Returns:
        The limit. Pair by pair where both have as many marks of this rate, of which only those count that are known on
        both sides; else, and where there are none of those, from the two rates, as of different prompts.

    Raises:
        KeyError: If one of them has no such rate.

    Example:
        >>> before, after = (Score({"asr": rate(0, 100)}, marks={"asr": "0" * 100}) for _ in range(2))
        >>> round(score_upper_limit(before, after, "asr").limit, 4)
        0.0263
    """
    first, second = before.marks.get(name, ""), after.marks.get(name, "")
    same = len(first) == len(second)
    known = [pair for pair in zip(first, second, strict=True) if UNKNOWN not in pair] if same else []
    if not known:
        rates = before.rates[name], after.rates[name]
        return UpperLimit(unpaired_upper_limit(*rates), min(found.n for found in rates), paired=False)
    limit = paired_upper_limit([mark == YES for mark, _ in known], [mark == YES for _, mark in known])
    return UpperLimit(limit, len(known), paired=True)


def paired_upper_limit(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Return the 95 % one-sided upper limit of the difference of two paired proportions, by Tango's score method.

    Unlike a bootstrap or a Wald interval it does not become a point where no pair changed: there it is
    z^2 / (n + z^2), since a change of some rarer kind may not have been met.

    Args:
        before: The property, for every pair.
        after: The same afterwards.

    Returns:
        The limit of the share after less the share before, in (-1, 1]; NaN where there are no pairs.

    Raises:
        ValueError: If the two differ in length.

    Example:
        >>> round(paired_upper_limit([False] * 268, [False] * 268), 5)
        0.00999

    Source: Tango, Statistics in Medicine 17, 1998, 891-908.
    """
    pairs = list(zip(before, after, strict=True))
    return _tango_limit(sum(b < a for b, a in pairs), sum(b > a for b, a in pairs), len(pairs), Z_ONE_SIDED)


def unpaired_upper_limit(before: Rate, after: Rate) -> float:
    """Return the 95 % one-sided upper limit of the difference of two independent rates, by Newcombe's hybrid method.

    Args:
        before: A rate.
        after: The same of others.

    Returns:
        The limit of the share after less the share before; NaN where one of them is not known.

    Example:
        >>> round(unpaired_upper_limit(rate(10, 100), rate(10, 100)), 3)
        0.072

    Source: Newcombe, Statistics in Medicine 17, 1998, 873-890, method 10.
    """
    if not before.n or not after.n:
        return math.nan
    from scipy.stats import binomtest

    # The ends of a two-sided interval of 90 % are the one-sided limits of 95 %.
    ends = [binomtest(found.count, found.n).proportion_ci(2 * CONFIDENCE - 1, "wilson") for found in (before, after)]
    return after.share - before.share + math.hypot(before.share - ends[0].low, ends[1].high - after.share)


def least_pairs(rho: float) -> int:
    """Return how many pairs it takes at least until a paired upper limit can be as low as rho: none of them changes.

    Args:
        rho: The limit, in (0, 1).

    Returns:
        The number of pairs.

    Example:
        >>> least_pairs(0.01), least_pairs(0.05)
        (268, 52)
    """
    return math.ceil(Z_ONE_SIDED**2 * (1 - rho) / rho)


def sign_flip_test(differences: Sequence[float]) -> float:
    """Test whether paired differences have mean 0: exact and two-sided, over every choice of their signs.

    Where nothing but chance decides which of a pair is the higher one, each of the 2^n choices of signs is as likely
    as any other. The p-value is the share of them whose sum lies as far from 0 as the one that was found, or farther;
    with n differences it cannot fall below 2 / 2^n.

    Args:
        differences: One per pair, such as a seed. Time and memory grow as 2^(n / 2).

    Returns:
        The p-value; NaN where there are no pairs, or a difference is not known.

    Example:
        >>> sign_flip_test([1.0, 2.0, 0.5, 3.0, 1.5, 2.5])
        0.03125

    Source: Fisher, The Design of Experiments, 1935, section 21.
    """
    import numpy as np

    n = len(differences)
    if n == 0 or any(map(math.isnan, differences)):
        return math.nan
    sizes = np.abs(np.asarray(differences, dtype=np.float64))
    # A sum that is equal but for rounding is as far from 0.
    found = abs(math.fsum(differences)) - 1e-12 * sizes.sum()
    # Each sum is one of the first half plus one of the second: those far enough are counted without listing them all.
    first, second = _signed_sums(sizes[: n // 2]), np.sort(_signed_sums(sizes[n // 2 :]))
    as_far = int((len(second) - np.searchsorted(second, found - first)).sum())
    return min(1.0, 2 * as_far / 2**n)


def cohen_kappa(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Return Cohen's kappa of two judges: their agreement beyond what chance alone would give.

    Args:
        first: What the first says, for every thing.
        second: What the second says.

    Returns:
        Kappa, at most 1; NaN where there is nothing to compare, or where both say one and the same thing throughout.

    Raises:
        ValueError: If the two differ in length.

    Example:
        >>> cohen_kappa([True, True, False, False], [True, False, False, False])
        0.5

    Source: Cohen, Educational and Psychological Measurement 20, 1960.
    """
    pairs = list(zip(first, second, strict=True))
    if not pairs:
        return math.nan
    n = len(pairs)
    a, b = sum(first) / n, sum(second) / n
    agreed, expected = sum(x == y for x, y in pairs) / n, a * b + (1 - a) * (1 - b)
    return math.nan if expected == 1 else (agreed - expected) / (1 - expected)


def _tango_limit(gained: int, lost: int, n: int, z: float) -> float:
    """The largest difference d whose score statistic is not below -z: that of `gained - lost` pairs, were d true."""
    if n == 0:
        return math.nan
    if gained == n:
        return 1.0
    from scipy.optimize import brentq

    def above(d: float) -> float:
        """The statistic plus z, times its standard error, which may be 0."""
        # The share of pairs that lose the property, at its likeliest where the difference is d.
        b, c = (2 * n - gained + lost) * d - gained - lost, -lost * d * (1 - d)
        share = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
        return gained - lost - n * d + z * math.sqrt(max(0.0, n * (2 * share + d * (1 - d))))

    # Where all pairs lost it the standard error is 0 at the difference itself, which is no limit.
    return cast(float, brentq(above, (gained - lost) / n + 1e-12, 1.0, xtol=1e-14))


def _signed_sums(sizes: "np.ndarray") -> "np.ndarray":
    """The sums of all choices of signs."""
    import numpy as np

    sums = np.zeros(1)
    for size in sizes:
        sums = np.concatenate([sums - size, sums + size])
    return sums


def _bootstrap(gained: int, lost: int, n: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the difference; a resample of pairs is a draw of how many gained and lost it."""
    import numpy as np
    from scipy.stats import multinomial

    shares = [gained / n, lost / n, (n - gained - lost) / n]
    draws = multinomial.rvs(n, shares, size=RESAMPLES, random_state=np.random.default_rng(seed))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / n, [tail, 1 - tail])
    return float(low), float(high)
