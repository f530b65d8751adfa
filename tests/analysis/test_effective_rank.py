"""The effective rank: both readings by hand, what is said of them, and what the figure of a curve shows."""

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lox_hf.analysis.effective_rank import effective_rank, too_few
from lox_hf.errors import ConfigError
from lox_hf.plots.rank_curve import draw_rank_curve, save_rank_curve_plot
from lox_hf.plots.style import svg_text
from lox_hf.records import CurvePoint, EffectiveRank, ModelReference, RankCurve, Score
from lox_hf.statistics import paired_upper_limit, rate

Counts = dict[int, int]


def score(count: int, n: int, marked: bool = True) -> Score:
    marks = {"asr": "1" * count + "0" * (n - count)} if marked else {}
    return Score({"asr": rate(count, n)}, {"kl": count / 10}, marks)


def points(counts: Counts, n: int, marked: bool = True) -> list[CurvePoint]:
    return [CurvePoint(r, min(1.0, r / 10), score(count, n, marked)) for r, count in counts.items()]


def found(counts: Counts, aligned: int, n: int, rho: float = 0.01, marked: bool = True) -> EffectiveRank:
    return effective_rank(points(counts, n, marked), score(aligned, n, marked), "asr", rho)


def curve(counts: Counts, aligned: int, n: int) -> RankCurve:
    effective = found(counts, aligned, n)
    reference = ModelReference("aligned"), ModelReference("base")
    return RankCurve(*reference, {}, tuple(points(counts, n)), score(aligned, n), 4, effective=effective)


def test_the_papers_rule_is_strict_and_exact() -> None:
    # One prompt of 100 more is not less than 0.01, though 3/100 - 2/100 < 0.01 in floating point.
    assert 3 / 100 - 2 / 100 < 0.01
    assert found({0: 90, 1: 3, 2: 2}, aligned=2, n=100).by_rule == 2
    assert found({0: 90, 1: 3, 2: 2}, aligned=2, n=100, rho=0.011).by_rule == 1
    assert found({0: 90, 4: 0, 2: 50}, aligned=2, n=100).by_rule == 4  # below the aligned model's is below
    assert found({0: 90, 1: 30}, aligned=2, n=100).by_rule is None


def test_what_is_certain_by_hand() -> None:
    asked = found({0: 290, 1: 20, 2: 5, 3: 4, 4: 4}, aligned=4, n=300)
    assert (asked.by_rule, asked.certain, asked.paired, asked.n, asked.least_n) == (2, 3, True, 300, 268)
    limits = {
        r: paired_upper_limit([True] * 4 + [False] * 296, [True] * count + [False] * (300 - count))
        for r, count in ((2, 5), (3, 4))
    }
    assert asked.upper_limits["2"] == limits[2] > 0.01 >= limits[3] == asked.upper_limits["3"]
    assert too_few(asked) is None
    fewer = found({0: 90, 1: 2, 2: 2}, aligned=2, n=100)
    assert (fewer.by_rule, fewer.certain) == (1, None) and "100 prompts: it takes at least 268" in str(too_few(fewer))


def test_without_marks_two_rates_are_compared() -> None:
    asked = found({0: 2900, 1: 40}, aligned=40, n=3000, marked=False)
    assert not asked.paired and asked.certain == 1 and "could not be compared one by one" in asked.words[-1]
    assert asked.upper_limits["1"] > found({1: 40}, aligned=40, n=3000).upper_limits["1"]  # pairs know more


@given(st.dictionaries(st.integers(0, 12), st.integers(0, 400), min_size=1), st.integers(0, 400))
def test_what_is_certain_is_so_by_the_rule_too(counts: Counts, aligned: int) -> None:
    counts = dict(sorted(counts.items()))
    asked = found(counts, aligned, n=400)
    assert asked.by_rule is None or asked.by_rule in counts
    if asked.certain is not None:
        assert asked.by_rule is not None and asked.by_rule <= asked.certain
    assert EffectiveRank.from_json(asked.to_json()) == asked and len(asked.words) >= 2


@pytest.mark.parametrize(
    ("counts", "aligned", "n", "words"),
    [
        (
            {0: 90, 1: 2},
            2,
            100,
            "effective rank is 1: .* 2.0 % of 100, is less than 1 percentage point above .* 2.0 %",
        ),
        ({0: 90, 1: 2}, 2, 100, "At 95 % this cannot be said with 100 prompts: it takes at least 268"),
        (
            {0: 290, 1: 1},
            1,
            300,
            "At 95 % r = 1 suffices too: the rate lies there at most 0.89 percentage points above",
        ),
        ({0: 290, 1: 60}, 4, 300, "no measured rank suffices: up to r = 1 the attack success rate stays 1 percentage"),
        (
            {0: 290, 1: 6, 2: 60},
            4,
            300,
            "At 95 % no measured rank can be said .* r = 1 comes closest, with at most 2 p",
        ),
        ({0: 290, 1: 2, 2: 60, 3: 2}, 2, 300, r"not monotone: .* above again at r = 2 \(20.0 % of 300\)"),
        ({0: 290, 1: 60, 4: 2, 8: 2}, 2, 300, "r = 2, 3 was not measured, so the effective rank may be lower"),
        ({0: 2, 1: 2}, 2, 300, "Without any direction it is as safe on these prompts"),
    ],
)
def test_what_is_said(counts: Counts, aligned: int, n: int, words: str) -> None:
    asked = found(counts, aligned, n)
    assert re.search(words, " ".join(asked.words)), asked.words
    plain = found({0: 290, 1: 2, 2: 2}, 2, 300)
    assert len(plain.words) == 2  # control: nothing else is said where nothing else is to say


def test_nothing_scored_says_nothing() -> None:
    asked = found({0: 0, 1: 0}, aligned=0, n=0)
    assert (asked.by_rule, asked.certain, asked.n) == (None, None, 0)
    assert asked.words == ("Nothing can be said: the attack success rate was not measured.",)
    assert math.isnan(EffectiveRank.from_json(asked.to_json()).upper_limits["0"])


def texts(record: RankCurve, measure: str | None = None) -> str:
    return svg_text(draw_rank_curve(record, measure))


def test_the_figure_shows_the_record() -> None:
    record = curve({0: 290, 1: 20, 2: 5, 3: 4, 4: 4}, aligned=4, n=300)
    drawn = texts(record)
    for words in (
        "attack success rate (%)",
        "effective rank (paper's rule): 2",
        "certain at 95 %: 3",
        "rho = 0.01",
        "95 % interval",
        "aligned model",
        "each of 4 matrices",
        "energy of the change (%)",
    ):
        assert words in drawn
    axes = draw_rank_curve(record).axes[0]
    curves = [line for line in axes.get_lines() if len(line.get_xdata()) == 5]
    assert list(curves[0].get_xdata()) == [0, 1, 2, 3, 4]
    assert list(curves[0].get_ydata()) == pytest.approx([100 * count / 300 for count in (290, 20, 5, 4, 4)])
    assert texts(RankCurve.from_json(record.to_json())) == drawn  # from its JSON alone
    uncertain = texts(curve({0: 90, 1: 2}, aligned=2, n=100))
    assert "certain at" not in uncertain and "paper's rule): 1" in uncertain


def test_a_plain_figure_is_drawn_without_intervals() -> None:
    record = curve({0: 290, 1: 20}, aligned=4, n=300)
    drawn = texts(record, "kl")
    assert "KL divergence from the aligned" in drawn and "interval" not in drawn and "rho" not in drawn
    with pytest.raises(ConfigError, match=r"'ppl' was not measured\. There is asr, kl"):
        draw_rank_curve(record, "ppl")


def test_the_figure_is_saved_as_png_and_svg(tmp_path: Path) -> None:
    record = curve({0: 290, 1: 20}, aligned=4, n=300)
    first = [path.read_bytes() for path in save_rank_curve_plot(record, tmp_path / "rank_curve")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank_curve.png", "rank_curve.svg"]
    assert [path.read_bytes() for path in save_rank_curve_plot(record, tmp_path / "rank_curve")] == first
