"""The choice on made-up figures: no limit is broken, nothing better is passed over, every case has its words."""

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lox_hf.analysis.limits import DEFAULT_LIMITS, change, check_limits, upper_change
from lox_hf.analysis.recommend import loss, pareto, recommend, references, worth_attacking
from lox_hf.config import LoxConfig
from lox_hf.errors import ConfigError
from lox_hf.records import Candidate, Limit, ModelReference, Score, Selection
from lox_hf.statistics import rate as slow_rate

rate = lru_cache(slow_rate)
N = 400
"""With no answer changed, a rise of 2 points can be excluded from 133 prompts on."""


def score(asr: int = 0, refused: int = 0, right: int = N, kl: float = 0.0, n: int = N, **figures: float) -> Score:
    counts = {"asr": asr, "over_refusal": refused, "accuracy": right}
    return Score(
        {name: rate(count, n) for name, count in counts.items()},
        {"kl": kl, **figures},
        {name: "1" * count + "0" * (n - count) for name, count in counts.items()},
    )


def attacked(asr: int, mean: float) -> Score:
    return Score({"asr": rate(asr, N)}, {"asr_mean": mean}, {"asr": "1" * asr + "0" * (N - asr)})


def candidate(found: Score, strength: float = 0.5, after: Score | None = None, **config: Any) -> Candidate:
    settings = LoxConfig(**{"r": 2, "alpha": 0.5, **config})
    name = f"r={'full' if settings.r is None else settings.r} alpha={settings.alpha:g} all"
    return Candidate(name, settings.to_dict(), "all", strength, found, after)


def selection(*candidates: Candidate, aligned: Score | None = None, after: Score | None = None) -> Selection:
    named = [
        replace(item, name=f"{item.name} {number}" if len(candidates) > 1 else item.name)
        for number, item in enumerate(candidates)
    ]
    return Selection(
        ModelReference("aligned"),
        ModelReference("base"),
        aligned or score(),
        tuple(named),
        DEFAULT_LIMITS,
        "strength" if after is None else "asr_mean",
        after,
    )


counts = st.sampled_from([0, 1, 8, 9, 20, 21, 40])
scores = st.builds(score, counts, counts, counts.map(lambda lost: N - lost), st.floats(0, 0.3))
candidates = st.builds(
    candidate,
    scores,
    st.floats(0.1, 3),
    st.none() | st.builds(attacked, st.sampled_from([0, 100, 200, 300]), st.floats(0, 1)),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(candidates, min_size=1, max_size=8), st.none() | st.just(attacked(200, 0.5)))
def test_what_is_recommended(items: list[Candidate], after: Score | None) -> None:
    found = recommend(selection(*items, after=after))
    assert found.reasons
    keeping = [item for item in found.candidates if not item.broken and not math.isnan(loss(item, found.objective))]
    for item in found.candidates:
        moved = [change(limit, found.aligned_score, item.score) > limit.most + 1e-9 for limit in found.limits]
        assert any(moved) == bool(item.broken)
    if found.recommended is None:
        level = 0.0 if after is None else 0.5
        certain = [item for item in keeping if not item.uncertain]
        assert all(loss(item, found.objective) >= level for item in certain or keeping)
        return
    chosen = found.get(found.recommended)
    assert chosen in keeping
    eligible = [item for item in keeping if not item.uncertain] or keeping
    assert loss(chosen, found.objective) == min(loss(item, found.objective) for item in eligible)
    assert after is None or loss(chosen, found.objective) < 0.5
    assert bool(found.warnings) == bool(chosen.uncertain)


@given(st.lists(st.lists(st.integers(0, 3).map(float) | st.just(math.nan), min_size=2, max_size=2), max_size=8))
def test_front(rows: list[list[float]]) -> None:
    known = [[math.inf if math.isnan(value) else value for value in row] for row in rows]

    def beats(one: list[float], other: list[float]) -> bool:
        return one != other and all(a <= b for a, b in zip(one, other, strict=True))

    assert pareto(rows) == [not any(beats(other, row) for other in known) for row in known]
    assert not rows or any(pareto(rows))


def test_changes_in_their_units() -> None:
    aligned, worse = score(asr=4, right=396, perplexity=10.0), score(asr=12, right=380, kl=0.2, perplexity=10.6)
    moved = {limit.measure: change(limit, aligned, worse) for limit in DEFAULT_LIMITS}
    assert moved["asr"] == pytest.approx(0.02) and moved["accuracy"] == pytest.approx(0.04)
    assert moved["kl"] == pytest.approx(0.2) and moved["perplexity"] == pytest.approx(0.06)
    assert moved["over_refusal"] == 0 and math.isnan(moved["gsm8k"])
    found = recommend(selection(candidate(worse), aligned=aligned))
    # 2 points of ASR are just allowed, and 20 answers that were right are not.
    assert found.candidates[0].broken == (
        "accuracy falls by 4.0 points, 2.0 points allowed",
        "kl rises by 0.2, 0.1 allowed",
        "perplexity rises by 6.0 %, 5.0 % allowed",
    )
    assert math.isnan(upper_change(Limit("kl", 0.1), aligned, worse))
    # A fall of accuracy is bounded from above as a rise of errors would be.
    assert upper_change(Limit("accuracy", 0.02, higher_is_worse=False), aligned, worse) > 0.04


def test_a_share_of_nothing_breaks_every_limit() -> None:
    limit = Limit("perplexity", 0.05, relative=True)
    aligned, worse = score(perplexity=0.0), score(perplexity=1.0)
    assert change(limit, aligned, worse) == math.inf and change(limit, aligned, aligned) == 0


def test_a_limit_of_0_is_never_certain_and_no_number_is_made_up_for_it() -> None:
    found = recommend(replace(selection(candidate(score())), limits=(Limit("asr", 0.0), Limit("over_refusal", 0.001))))
    (warning,) = found.warnings
    assert warning.endswith("No number of prompts makes a limit of 0 certain: asr.")
    assert "at least 2703 for over_refusal where no answer gets worse" in warning


def test_a_measure_that_a_candidate_lacks_is_a_limit_broken() -> None:
    lacking = Score({name: rate for name, rate in score().rates.items() if name != "accuracy"}, {"kl": 0.0})
    (found,) = recommend(selection(candidate(lacking))).candidates
    assert found.broken == ("accuracy is not measured",)


def test_what_the_aligned_model_lacks_is_not_judged_and_said() -> None:
    found = recommend(selection(candidate(Score.of({"kl": 0.05})), aligned=Score.of({"kl": 0.0})))
    assert found.recommended == "r=2 alpha=0.5 all"
    said = "Not judged, as it was not measured of the aligned model: asr, over_refusal, degenerate, accuracy, gsm8k"
    assert any(said in reason for reason in found.reasons)
    nothing = recommend(selection(candidate(Score.of({"own": 1.0})), aligned=Score.of({"own": 1.0})))
    assert any("none of the limits could be judged" in reason for reason in nothing.reasons)


def test_strength_decides_without_an_attack_and_that_is_said() -> None:
    found = recommend(selection(candidate(score(), 0.4), candidate(score(), 0.9), candidate(score(kl=1.0), 2.0)))
    assert found.recommended == "r=2 alpha=0.5 all 1"
    assert "of the 2 of 3 candidates that keep every limit for certain it is the strongest edit" in found.reasons[0]
    assert any("Robustness was not measured" in reason and "stress" in reason for reason in found.reasons)


def test_an_attack_decides_and_chance_is_told() -> None:
    items = [candidate(score(), 0.9, attacked(300, 0.6)), candidate(score(), 0.4, attacked(100, 0.3))]
    found = recommend(selection(*items, after=attacked(360, 0.7)))
    assert found.recommended == "r=2 alpha=0.5 all 1"
    assert "30.0 % against 70.0 % of the aligned model" in found.reasons[0]
    assert any("is hardly chance" in reason for reason in found.reasons)
    alike = recommend(selection(candidate(score(), 0.9, attacked(359, 0.69)), after=attacked(360, 0.7)))
    assert alike.recommended and any("could be chance" in reason for reason in alike.reasons)
    plain = replace(attacked(300, 0.69), marks={})
    unmarked = recommend(selection(candidate(score(), 0.9, plain), after=attacked(360, 0.7)))
    assert any("chance is not known" in reason for reason in unmarked.reasons)


def test_ties_go_to_fewer_refusals_then_divergence_then_the_smaller_edit() -> None:
    after = attacked(100, 0.3)
    items = [
        candidate(score(refused=1), 0.1, after),
        candidate(score(kl=0.02), 0.2, after),
        candidate(score(kl=0.01), 0.9, after),
        candidate(score(kl=0.01), 0.8, after),
    ]
    for count, name in ((1, "0"), (2, "1"), (3, "2"), (4, "3")):
        found = recommend(selection(*items[:count], after=attacked(360, 0.7)))
        assert found.recommended and found.recommended.endswith(f" {name}" if count > 1 else "all")


def test_what_keeps_the_limits_for_certain_goes_before_what_may_not() -> None:
    sure, unsure = candidate(score(), 0.4), candidate(score(refused=18), 0.9)
    found = recommend(selection(sure, unsure))
    assert found.recommended == "r=2 alpha=0.5 all 0" and found.candidates[1].uncertain and not found.warnings
    alone = recommend(selection(unsure))
    assert alone.recommended and "at least 52 for over_refusal" in alone.warnings[0]


def test_nothing_keeps_the_limits() -> None:
    items = [candidate(score(refused=30), 0.5), candidate(score(refused=22), 0.6), candidate(score(kl=1.0), 0.1)]
    found = recommend(selection(*items))
    assert found.recommended is None and not found.warnings
    assert "None of the 3 candidates" in found.reasons[0]
    assert "r=2 alpha=0.5 all 1: over_refusal rises by 5.5 points, 5.0 points allowed" in found.reasons[0]


def test_hardening_that_does_not_help() -> None:
    found = recommend(selection(candidate(score(), 0.5, attacked(400, 0.8)), after=attacked(360, 0.7)))
    assert found.recommended is None
    assert "Hardening does not help here" in found.reasons[0] and "70.0 %" in found.reasons[0]
    assert not any("stronger attack" in reason for reason in found.reasons)
    weak = recommend(selection(candidate(score(), 0.5, attacked(0, 0.0)), after=attacked(0, 0.0)))
    assert weak.recommended is None and any("choose a stronger attack" in reason for reason in weak.reasons)


def test_paper_and_full_rank_are_named_beside_it() -> None:
    items = [
        candidate(score(), 0.5, attacked(10, 0.1)),
        candidate(score(refused=80), 1.5, attacked(0, 0.01), r=6, alpha=1.25),
        candidate(score(), 0.8, attacked(300, 0.6), r=None, alpha=0.5),
        candidate(score(), 1.0, attacked(200, 0.5), r=None, alpha=1.0),
    ]
    found = recommend(selection(*items, after=attacked(360, 0.7)))
    assert found.recommended == "r=2 alpha=0.5 all 0"
    assert [item.config["alpha"] for item in references(items)] == [1.25, 1.0]
    said = " ".join(found.reasons)
    assert "The paper's setting, r=6 alpha=1.25 all 1, breaks a limit (over_refusal rises by 20.0 points" in said
    assert (
        "Full rank, r=full alpha=1 all 3, keeps the limits; its mean attack success rate along the attack is 50.0 %"
        in said
    )


def test_whom_to_attack() -> None:
    items = [
        candidate(score(kl=0.01), 0.2),
        candidate(score(kl=0.06), 0.9, alpha=0.7),
        candidate(score(kl=0.03), 0.5, alpha=0.8, r=3),
        candidate(score(kl=0.03, refused=18), 0.6, alpha=0.9, r=4),  # keeps a limit, but not for certain
        candidate(score(kl=0.5), 3.0, alpha=0.9),  # breaks a limit
        candidate(score(kl=0.5), 4.0, r=None, alpha=1.0),  # so does this, and is asked about in any case
    ]
    chosen = [worth_attacking(_judged(items), most) for most in (1, 2, 3, 4, 9)]
    assert [[item.strength for item in some] for some in chosen] == [
        [0.9, 4.0],
        [0.9, 0.5, 4.0],
        [0.2, 0.9, 0.5, 4.0],
        [0.2, 0.9, 0.5, 0.6, 4.0],
        [0.2, 0.9, 0.5, 0.6, 4.0],
    ]


def _judged(items: list[Candidate]) -> list[Candidate]:
    found = recommend(selection(*items)).candidates
    return [replace(item, broken=own.broken, uncertain=own.uncertain) for item, own in zip(items, found, strict=True)]


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ([Limit("kl", -0.1)], "kl must be a number of 0 or more, got -0.1"),
        ([Limit("kl", math.nan)], "got nan"),
        ([Limit("kl", 0.1), Limit("kl", 0.2), Limit("asr", -1.0)], "kl has two limits; the limit of asr"),
    ],
)
def test_limits_that_cannot_be_meant(limits: list[Limit], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_limits(limits)


def test_a_saved_selection_is_judged_by_other_limits() -> None:
    found = recommend(selection(candidate(score(), 0.4), candidate(score(kl=0.05), 0.9)))
    read = Selection.from_json(found.to_json())
    assert read == found and recommend(read) == found
    stricter = recommend(replace(read, limits=(Limit("kl", 0.0),)))
    assert (found.recommended, stricter.recommended) == ("r=2 alpha=0.5 all 1", "r=2 alpha=0.5 all 0")
