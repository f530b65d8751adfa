"""Rates, paired tests and agreement, against published values and closed forms."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lox_hf.records import PairedDifference, Rate
from lox_hf.statistics import cohen_kappa, paired_difference, rate, sign_flip_test

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
    sums = [abs(sum(map(lambda sign, value: sign * value, signs, exact)))
            for signs in itertools.product((1, -1), repeat=len(exact))]
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
