"""Rates, paired tests and agreement, against published values and closed forms."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lox_hf.records import PairedDifference, Rate, Score
from lox_hf.statistics import (
    Z_ONE_SIDED,
    _tango_limit,
    cohen_kappa,
    least_pairs,
    paired_difference,
    paired_upper_limit,
    rate,
    score_upper_limit,
    sign_flip_test,
    unpaired_upper_limit,
)

PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def test_wilson_interval_of_the_literature() -> None:
    # Newcombe, Statistics in Medicine 17, 1998, table I, method 3: four cases to four decimals.
    cases = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (count, n), expected in cases.items():
        found = rate(count, n)
        assert (round(found.low, 4), round(found.high, 4)) == expected


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    # The roots p of (count / n - p)^2 = z^2 p (1 - p) / n, found by bisection with 40 digits.
    [(0, 144, 0.0, 0.025983), (144, 144, 0.974017, 1.0), (1, 10, 0.017876, 0.404150), (72, 144, 0.419403, 0.580597)],
)
def test_wilson_interval_by_bisection(count: int, n: int, low: float, high: float) -> None:
    found = rate(count, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-6)


@given(st.integers(0, 300), st.integers(0, 300))
def test_a_rate_lies_in_its_interval(count: int, others: int) -> None:
    found = rate(count, count + others, unscored=3)
    if count + others == 0:
        assert all(math.isnan(value) for value in (found.share, found.low, found.high)) and found.unscored == 3
        return
    assert 0 <= found.low <= found.share <= found.high <= 1
    assert found.low < found.high  # never a point: n is finite
    mirrored = rate(others, count + others)
    assert mirrored.low == pytest.approx(1 - found.high, abs=1e-12)


def test_a_rate_comes_back_from_json() -> None:
    for found in (rate(3, 100, 2), rate(0, 0)):
        again = Rate.from_json(found.to_json())
        assert again == found or (again.n, math.isnan(again.share), math.isnan(again.high)) == (0, True, True)
    assert str(rate(0, 0)) == "not measured" and str(rate(1, 4)) == "25.0 % [4.6, 69.9] of 4"


def test_mcnemar_by_hand() -> None:
    # 10 pairs changed, 2 one way and 8 the other: 2 * P(Binomial(10, 1/2) <= 2) = 2 * 56 / 1024.
    before = [True] * 8 + [False] * 2 + [True] * 5 + [False] * 5
    after = [False] * 8 + [True] * 2 + [True] * 5 + [False] * 5
    found = paired_difference(before, after)
    assert (found.gained, found.lost, found.difference) == (2, 8, -0.3)
    assert found.p_value == pytest.approx(2 * 56 / 1024, rel=1e-12)
    assert (found.before.count, found.after.count, found.before.n) == (13, 7, 20)


def test_bootstrap_interval_is_the_normal_one_on_many_pairs() -> None:
    n, gained, lost = 2000, 200, 500
    before = [False] * gained + [True] * lost + [True] * (n - gained - lost)
    after = [True] * gained + [False] * lost + [True] * (n - gained - lost)
    found = paired_difference(before, after)
    difference = (gained - lost) / n
    spread = 1.96 * math.sqrt(((gained + lost) / n - difference**2) / n)
    # A bootstrap of 9,999 draws places a 2.5 % point to about 2 % of the spread.
    assert found.low == pytest.approx(difference - spread, abs=0.06 * spread)
    assert found.high == pytest.approx(difference + spread, abs=0.06 * spread)


def test_the_bootstrap_is_seeded_and_leaves_the_global_state() -> None:
    import numpy as np

    before, after = [True, False, True, False, True] * 8, [False, False, True, True, False] * 8
    np.random.seed(1)
    state = np.random.get_state()[1].copy()
    assert paired_difference(before, after, 1) == paired_difference(before, after, 1)
    assert (np.random.get_state()[1] == state).all()
    np.random.random()
    assert not (np.random.get_state()[1] == state).all()  # control: a draw would have been seen


@given(PAIRS)
def test_a_difference_mirrors(pairs: list[tuple[bool, bool]]) -> None:
    before, after = [b for b, _ in pairs], [a for _, a in pairs]
    found, mirrored = paired_difference(before, after), paired_difference(after, before)
    assert found.difference == -mirrored.difference and found.p_value == pytest.approx(mirrored.p_value)
    assert found.low <= found.difference <= found.high


def test_no_pairs_is_not_known() -> None:
    found = paired_difference([], [])
    assert math.isnan(found.difference) and math.isnan(found.p_value) and found.before.n == 0
    assert math.isnan(PairedDifference.from_json(found.to_json()).difference)


def test_sign_flips_by_hand() -> None:
    # All on one side: only all signs as found, or all flipped, are as far from 0.
    assert sign_flip_test([3.0, 1.0, 2.0]) == sign_flip_test([-3.0, -1.0, -2.0]) == 2 / 2**3
    # |±3 ±1 ±2| >= |3 - 1 + 2| = 4: 6, 4 and their mirror images, of eight.
    assert sign_flip_test([3.0, -1.0, 2.0]) == 4 / 2**3
    assert sign_flip_test([0.0, 0.0]) == sign_flip_test([5.0]) == sign_flip_test([1.0, -1.0]) == 1.0


def test_darwins_plants() -> None:
    # Fisher, The Design of Experiments, section 21: of 2^15 sums 863 are as large as the one found, or larger, and as
    # many as small; 835 are larger.
    inches = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    assert sum(inches) == 314
    assert sign_flip_test(inches) == 2 * 863 / 2**15


@given(st.lists(st.integers(-30, 30), min_size=1, max_size=9))
def test_sign_flips_against_counting_exactly(tenths: list[int]) -> None:
    # Tenths are no binary fractions: sums that are equal must count as equal in spite of rounding.
    exact = [Fraction(tenth, 10) for tenth in tenths]
    sums = [
        abs(sum(map(lambda sign, value: sign * value, signs, exact)))
        for signs in itertools.product((1, -1), repeat=len(exact))
    ]
    expected = sum(found >= abs(sum(exact)) for found in sums) / len(sums)
    assert sign_flip_test([tenth / 10 for tenth in tenths]) == expected
    assert expected >= 2 / 2 ** len(tenths) or expected == 1


def test_sign_flips_of_many_pairs_are_still_exact() -> None:
    assert sign_flip_test([1.0] * 40) == 2 / 2**40
    assert sign_flip_test([1.0] * 39 + [-1.0]) == 2 * 41 / 2**40


def test_sign_flips_of_nothing_are_not_known() -> None:
    assert math.isnan(sign_flip_test([])) and math.isnan(sign_flip_test([1.0, math.nan]))


def test_kappa_by_hand() -> None:
    # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: agreement 0.7, by chance 0.5, so 0.4.
    first = [True] * 25 + [False] * 25
    second = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(first, first) == 1.0
    assert cohen_kappa([True, False], [False, True]) == -1.0
    assert math.isnan(cohen_kappa([], [])) and math.isnan(cohen_kappa([True] * 4, [True] * 4))


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError):
        paired_difference([True], [])
    with pytest.raises(ValueError):
        cohen_kappa([True], [])
    with pytest.raises(ValueError):
        paired_upper_limit([True], [])


def pairs_of(both: int, gained: int, lost: int, neither: int) -> tuple[list[bool], list[bool]]:
    before = [True] * both + [False] * gained + [True] * lost + [False] * neither
    return before, [True] * both + [True] * gained + [False] * lost + [False] * neither


def test_score_limits_of_the_literature() -> None:
    # Fagerland, Lydersen and Laake, Statistical Analysis of Contingency Tables, 2017, chapter 8: airway
    # hyper-responsiveness before and after a transplantation, 1 both, 1 only after, 7 only before, 12 neither; Tango's
    # interval of 95 % is -0.517 to -0.026, both ends found by the limit of one side.
    assert _tango_limit(1, 7, 21, 1.959964) == pytest.approx(-0.026, abs=5e-4)
    assert -_tango_limit(7, 1, 21, 1.959964) == pytest.approx(-0.517, abs=5e-4)
    # PropCIs (R), scoreci.mp(48, 41, 549, 0.9): -0.0157 to 0.0414.
    assert paired_upper_limit(*pairs_of(0, 48, 41, 460)) == pytest.approx(0.0414, abs=5e-5)
    assert -paired_upper_limit(*pairs_of(0, 41, 48, 460)) == pytest.approx(-0.0157, abs=5e-5)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 400))
def test_the_paired_limit_solves_its_equation(gained: int, lost: int, rest: int) -> None:
    n = gained + lost + rest
    before, after = pairs_of(0, gained, lost, rest)
    limit = paired_upper_limit(before, after)
    if n == 0:
        assert math.isnan(limit)
        return
    difference = (gained - lost) / n
    assert difference < limit <= 1 or limit == difference == 1
    if gained == n:
        return
    # The likelihood under the hypothesis is maximised by brute force: over the share of pairs that lose it.
    score = _score_by_search(gained, lost, n, limit)
    assert score == pytest.approx(-Z_ONE_SIDED, abs=2e-3)


def _score_by_search(gained: int, lost: int, n: int, d: float) -> float:
    """The score statistic at a difference of d, from its definition: the likelihood's maximum by ternary search."""

    def likelihood(q: float) -> float:
        counts = ((lost, q), (gained, q + d), (n - gained - lost, 1 - 2 * q - d))
        return sum(count * math.log(share) if count else 0.0 for count, share in counts if count or share > 0)

    low, high = max(0.0, -d) + 1e-15, (1 - d) / 2 - 1e-15
    for _ in range(200):
        one, two = low + (high - low) / 3, high - (high - low) / 3
        low, high = (one, high) if likelihood(one) < likelihood(two) else (low, two)
    q = (low + high) / 2
    return (gained - lost - n * d) / math.sqrt(n * (2 * q + d * (1 - d)))


@given(st.integers(1, 2000))
def test_no_change_is_no_certainty(n: int) -> None:
    z2 = Z_ONE_SIDED**2
    assert paired_upper_limit([False] * n, [False] * n) == pytest.approx(z2 / (n + z2), rel=1e-9)
    assert paired_upper_limit([True] * n, [False] * n) == pytest.approx(-(n - z2) / (n + z2), abs=1e-9)
    assert paired_upper_limit([False] * n, [True] * n) == 1.0
    found = paired_difference([False] * n, [False] * n)
    assert found.low == found.high == 0  # control: a bootstrap would be certain


@pytest.mark.parametrize("rho", [0.001, 0.01, 0.05, 0.3])
def test_least_pairs_are_the_least(rho: float) -> None:
    least = least_pairs(rho)
    assert paired_upper_limit([True] * least, [True] * least) <= rho
    assert paired_upper_limit([True] * (least - 1), [True] * (least - 1)) > rho


def test_limits_cover_the_truth_as_often_as_they_say() -> None:
    import numpy as np

    generator, draws = np.random.default_rng(0), 2000

    def coverage(found: "np.ndarray", truth: float, limit: Callable[..., float]) -> float:
        results, counts = np.unique(found, axis=0, return_counts=True)
        covering = [limit(*map(int, result)) >= truth for result in results]
        return counts[covering].sum() / draws

    def tango(gained: int, lost: int, same: int) -> float:
        return _tango_limit(gained, lost, gained + lost + same, Z_ONE_SIDED)

    # Shares of pairs that gain it and that lose it.
    for gain, lose, n in ((0.05, 0.02, 150), (0.02, 0.02, 300), (0.2, 0.1, 60)):
        found = generator.multinomial(n, [gain, lose, 1 - gain - lose], draws)
        assert 0.93 <= coverage(found, gain - lose, tango) <= 0.98
    found = generator.binomial([150, 120], [0.04, 0.09], (draws, 2))
    assert 0.93 <= coverage(found, 0.05, lambda a, b: unpaired_upper_limit(rate(a, 150), rate(b, 120))) <= 0.98


def test_the_unpaired_limit_of_the_literature() -> None:
    # Newcombe, Statistics in Medicine 17, 1998, table II (a), method 10: 56/70 - 48/80 at 95 % is 0.0524 to 0.3339.
    # The same construction at 90 % from the single limits, each a root of the score equation, by hand.
    first, second = rate(48, 80), rate(56, 70)
    z = Z_ONE_SIDED
    low = (48 + z * z / 2 - z * math.sqrt(48 * 32 / 80 + z * z / 4)) / (80 + z * z)
    high = (56 + z * z / 2 + z * math.sqrt(56 * 14 / 70 + z * z / 4)) / (70 + z * z)
    expected = 0.2 + math.hypot(0.6 - low, high - 0.8)
    assert unpaired_upper_limit(first, second) == pytest.approx(expected, abs=1e-9)
    assert 0.2 < expected < 0.3339
    assert math.isnan(unpaired_upper_limit(rate(0, 0), second)) and math.isnan(unpaired_upper_limit(first, rate(0, 0)))


def test_scores_are_paired_where_they_can_be() -> None:
    def score(marks: str | None, count: int = 1, n: int = 4) -> Score:
        return Score({"asr": rate(count, n)}, marks={} if marks is None else {"asr": marks})

    found = score_upper_limit(score("0-01"), score("0011"), "asr")
    assert (found.n, found.paired) == (3, True)
    assert found.limit == paired_upper_limit([False, False, True], [False, True, True])
    for after in (score(None, 2, 8), score("00110", 2, 8), score("----", 2, 8)):  # no marks, other prompts, none known
        found = score_upper_limit(score("0-01"), after, "asr")
        assert found == (unpaired_upper_limit(rate(1, 4), rate(2, 8)), 4, False)
    assert math.isnan(score_upper_limit(score("--", 0, 0), score("10"), "asr").limit)
    with pytest.raises(KeyError):
        score_upper_limit(score("1"), score("1"), "refusal")
