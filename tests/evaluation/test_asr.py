"""From verdicts to a report, and from reports to comparisons."""

import math
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lox_hf import SafetyReport, attack_success_rate, compare
from lox_hf.errors import ConfigError
from lox_hf.evaluation.asr import contains_answer, judge_responses
from lox_hf.evaluation.comparison import agreement, check_comparable
from lox_hf.evaluation.data.prompts import Prompt
from lox_hf.evaluation.judges import get_judge
from lox_hf.evaluation.judges.function import FunctionJudge
from lox_hf.evaluation.judges.refusal import RefusalJudge
from lox_hf.records import JudgeAgreement, SafetyComparison, Verdict

REFUSAL = "I'm sorry, but I can't help with that."
ANSWER = "First, take the brush to the attic and turn it over twice."
LOOP = "the the the the the the the the the the the the the the the the"


class Scripted:
    """A judge that says what it was told to, and remembers what it was asked."""

    name = "scripted"
    tells_refusals = False
    reads_prompts, durable = True, True

    def __init__(self, verdicts: dict[str, Verdict], **settings: Any) -> None:
        self.answers, self.own_settings = verdicts, settings
        self.asked: list[tuple[str, str]] = []

    def settings(self) -> dict[str, Any]:
        return dict(self.own_settings)

    def verdicts(
        self, prompts: Sequence[str], responses: Sequence[str], done: Collection[int] = ()
    ) -> Iterator[tuple[int, Verdict]]:
        self.asked += zip(prompts, responses, strict=True)
        self.done = set(done)
        for position in reversed(range(len(responses))):  # the order is free
            if responses[position] in self.answers:
                yield position, self.answers[responses[position]]


def report_of(*labels: str, judge: str = "refusal") -> SafetyReport:
    """A report in which the prompts p0, p1, ... end as the labels say."""
    texts = {"refused": REFUSAL, "complied": ANSWER, "degenerate": LOOP}
    return attack_success_rate(
        [f"p{number}" for number in range(len(labels))], [texts[name] for name in labels], judge
    )


def test_a_rate_over_what_was_scored() -> None:
    report = report_of("complied", "refused", "refused", "degenerate")
    assert (report.asr.count, report.asr.n, report.asr.share) == (1, 4, 0.25)
    assert (report.refusal.count, report.degenerate.count, report.asr.unscored) == (2, 1, 0)
    assert 0 < report.asr.low < 0.25 < report.asr.high < 1
    assert [outcome.label for outcome in report.outcomes] == ["complied", "refused", "refused", "degenerate"]
    assert report.outcomes[3].reason and report.versions["lox_hf"]
    assert report.over_refusal.n == 0 and math.isnan(report.over_refusal.share) and report.warnings == ()


def test_harmless_prompts_are_over_refusal_and_no_attack() -> None:
    prompts = [Prompt("h", True, "a"), Prompt("s", False, "a"), Prompt("t", False, "b")]
    report = attack_success_rate(prompts, [ANSWER, REFUSAL, ANSWER])
    assert (report.asr.count, report.asr.n) == (1, 1) and (report.over_refusal.count, report.over_refusal.n) == (1, 2)
    assert [(item.name, item.asr.n, item.over_refusal.count, item.over_refusal.n) for item in report.categories] == [
        ("a", 1, 1, 1),
        ("b", 0, 0, 1),
    ]


def test_nothing_scored_is_nan_with_a_warning_and_never_zero() -> None:
    with pytest.warns(UserWarning, match="not known"):
        empty = attack_success_rate([], [])
    with pytest.warns(UserWarning, match="2 are unscored, mostly as the judge gave no verdict"):
        silent = attack_success_rate(["a", "b"], [ANSWER, ANSWER], Scripted({}))
    for report in (empty, silent):
        assert math.isnan(report.asr.share) and report.asr.n == 0 and report.warnings
        assert '"share": null' in report.to_json()
        assert math.isnan(SafetyReport.from_json(report.to_json()).asr.share)
    assert silent.asr.unscored == 2 and silent.unscored_reasons == {"the judge gave no verdict": 2}
    with pytest.warns(UserWarning, match="No harmless prompt was scored, so the over-refusal rate is not known"):
        harmless = attack_success_rate(
            [Prompt("s", False)], [ANSWER], FunctionJudge(lambda p, r: [None], tells_refusals=True)
        )
    assert math.isnan(harmless.over_refusal.share) and harmless.warnings
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert report_of("refused").asr.share == 0.0  # control: a true zero has neither
        assert attack_success_rate([Prompt("s", False)], [ANSWER]).over_refusal.share == 0.0


def test_degenerate_responses_never_reach_the_judge() -> None:
    judge = Scripted({ANSWER: Verdict("complied"), LOOP: Verdict("complied"), "": Verdict("complied")})
    report = attack_success_rate(["a", "b", "c"], [ANSWER, LOOP, ""], judge)
    assert judge.asked == [("a", ANSWER)]
    assert (report.asr.count, report.asr.n, report.degenerate.count) == (1, 3, 2)


def test_a_harm_judge_is_not_asked_about_refusals_of_harmless_prompts() -> None:
    judge = Scripted({ANSWER: Verdict("refused"), REFUSAL: Verdict("refused")})
    prompts = [Prompt("h"), Prompt("s", False), Prompt("t", False)]
    report = attack_success_rate(prompts, [ANSWER, ANSWER, REFUSAL], judge)
    assert judge.asked == [("h", ANSWER)]
    assert (report.over_refusal.count, report.over_refusal.n, report.over_refusal_judge) == (1, 2, "refusal")
    told = FunctionJudge(lambda prompts, responses: [False] * len(responses), tells_refusals=True)
    assert attack_success_rate(prompts, [ANSWER, ANSWER, REFUSAL], told).over_refusal.count == 2  # control


def test_scores_of_a_rubric() -> None:
    verdicts = {f"{ANSWER} {n}": Verdict("complied" if n == 5 else "refused", score=n) for n in range(1, 6)}
    responses = [f"{ANSWER} {n}" for n in (1, 3, 4, 5, 5)] + [f"{ANSWER} 9", LOOP]
    judge = Scripted(verdicts, template_hash="abc", seed=42, model="m")
    report = attack_success_rate([str(n) for n in range(7)], responses, judge)
    assert report.rubric is not None and report.rubric.mean == 3.6
    assert (report.rubric.five.count, report.rubric.five.n, report.rubric.five.unscored) == (2, 5, 1)
    assert (report.rubric.four_or_five.count, report.rubric.four_or_five.n) == (3, 5)
    assert (report.asr.count, report.asr.n, report.asr.unscored) == (2, 6, 1)
    assert (report.template_hash, report.seed, report.judge_settings) == ("abc", 42, {"model": "m"})


def test_known_answers_are_strict_success() -> None:
    responses = [ANSWER, REFUSAL, "Take the brush to the attic?"]
    report = attack_success_rate(["a", "b", "c"], responses, references=["take the brush to the attic", "x y", None])
    assert [outcome.strict for outcome in report.outcomes] == [True, False, None]
    assert (report.strict_asr.count, report.strict_asr.n) == (1, 2)
    prompts = [Prompt("h", True, reference="brush"), Prompt("s", False, reference="attic"), Prompt("t", False)]
    report = attack_success_rate(prompts, [REFUSAL, ANSWER, ANSWER])
    assert (report.strict_asr.count, report.strict_asr.n, report.accuracy.count, report.accuracy.n) == (0, 1, 1, 1)
    assert contains_answer("He said: TAKE,  the-brush", "take the brush")
    assert not contains_answer("mistake the brush", "take the brush") and not contains_answer(ANSWER, " . ")


def test_every_record_comes_back_from_json() -> None:
    verdicts = {ANSWER: Verdict("complied", score=5), REFUSAL: Verdict("refused", score=1)}
    prompts = [Prompt("h", category="a"), Prompt("i", category="b", reference="brush"), Prompt("s", False)]
    report = attack_success_rate(prompts, [ANSWER, REFUSAL, ANSWER], Scripted(verdicts))
    assert SafetyReport.from_json(report.to_json()) == report
    comparison = compare(report, report)
    assert SafetyComparison.from_json(comparison.to_json()) == comparison
    found = agreement(report, report)
    assert JudgeAgreement.from_json(found.to_json()) == found
    verdict = Verdict("unscored", "no", 3, "raw", True)
    assert Verdict.from_json(verdict.to_json()) == verdict


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], []), "1 prompts, 0 responses"),
        ((["a"], [ANSWER], "refusal", []), "1 prompts, 1 responses, 0 references"),
        ((["a", "b"], [ANSWER, None]), "1 of 2 responses are not text, the first at position 1"),
        ((["a"], [ANSWER], "refuse"), "no judge 'refuse'"),
        ((["a"], [ANSWER], "classifier:"), "no judge 'classifier:'"),
        ((["a"], [ANSWER], 3), "got int"),
        ((["a"], [ANSWER], RefusalJudge), r"pass RefusalJudge\(\)"),
        (("abc", "abc"), "prompts is one text"),
        ((["a"], "a"), "responses is one text"),
        (([None], [ANSWER]), "1 of 1 prompts are not text"),
        ((["a"], [ANSWER], "refusal", [3]), "1 of 1 references are not text"),
        ((["a"], [ANSWER], lambda p, r: [Verdict("bogus")]), "expected True, False"),
        ((["a"], [ANSWER], lambda p, r: []), "judged 1 responses, but returned 0"),
        ((["a"], [ANSWER], lambda p, r: ["maybe"]), "returned 'maybe'"),
    ],
)
def test_mistakes_are_one_clear_line(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attack_success_rate(*arguments)


def test_functions_as_judges() -> None:
    import numpy as np

    def judge(prompts: Sequence[str], responses: Sequence[str]) -> list[Any]:
        return [True, False, None, "refused", Verdict("complied", score=4), np.True_, 0]

    report = attack_success_rate([str(n) for n in range(7)], [f"{ANSWER} {n}" for n in range(7)], judge)
    assert [outcome.label for outcome in report.outcomes] == [
        *("complied", "refused", "unscored", "refused", "complied", "complied", "refused")
    ]
    assert report.judge == "function:judge"


def test_the_same_text_harmful_and_harmless_is_not_one_prompt() -> None:
    before = attack_success_rate([Prompt("a"), Prompt("b")], [ANSWER, ANSWER])
    after = attack_success_rate([Prompt("a", False), Prompt("b")], [ANSWER, ANSWER])
    found = compare(before, after)
    assert (found.asr.before.n, found.over_refusal.before.n, found.unpaired) == (1, 0, 2)


def test_what_a_server_said_is_not_in_a_report() -> None:
    judge = Scripted({ANSWER: Verdict("unscored", "the judge did not answer: HTTP 400, your prompt was secret")})
    with pytest.warns(UserWarning):
        report = attack_success_rate(["a"], [ANSWER], judge)
    assert report.unscored_reasons == {"the judge did not answer: HTTP 400": 1} and "secret" not in report.to_json()


def test_two_functions_are_compared_with_a_warning() -> None:
    one, other = (attack_success_rate(["a"], [ANSWER], lambda p, r, says=says: [says]) for says in (True, False))
    assert "only you know" in compare(one, other).warnings[0]
    assert compare(report_of("complied"), report_of("complied")).warnings == ()  # control


def test_what_is_done_is_not_asked_again() -> None:
    prompts = [Prompt(str(number), number % 2 == 0) for number in range(6)]
    judge = Scripted({REFUSAL: Verdict("refused")})
    known = {0: Verdict("complied", score=5), 3: Verdict("complied"), 4: Verdict("complied")}
    responses = [REFUSAL, REFUSAL, REFUSAL, REFUSAL, LOOP, None]
    found = dict(judge_responses(judge, prompts, responses, known))
    labels = [found[position].label for position in range(6)]
    # What the rules say now goes over what is known, and harmless prompts are no matter of this judge's.
    assert labels == ["complied", "refused", "refused", "complied", "degenerate", "unscored"]
    assert judge.asked == [("0", REFUSAL), ("2", REFUSAL)] and judge.done == {0}


def test_a_comparison_by_hand() -> None:
    before = report_of(*["complied"] * 8, *["refused"] * 4)
    after = report_of(*["refused"] * 7, "complied", "complied", "refused", "refused", "degenerate")
    found = compare(before, after)
    assert (found.asr.before.count, found.asr.after.count, found.asr.before.n) == (8, 2, 12)
    assert (found.asr.lost, found.asr.gained, found.asr.difference) == (7, 1, -0.5)
    assert found.asr.p_value == pytest.approx(2 * 9 / 256)  # 2 P(Binomial(8, 1/2) <= 1)
    assert found.asr.low < -0.5 < found.asr.high and found.unpaired == 0
    assert (found.degenerate.gained, found.refusal.difference) == (1, pytest.approx(5 / 12))


def test_prompts_that_one_side_lacks_are_counted() -> None:
    before = attack_success_rate(["a", "b", "b", "c"], [ANSWER, ANSWER, REFUSAL, ANSWER])
    after = attack_success_rate(["b", "b", "d", "a"], [REFUSAL, REFUSAL, ANSWER, ANSWER])
    found = compare(before, after)
    assert (found.asr.before.n, found.asr.before.count, found.asr.after.count, found.unpaired) == (3, 2, 1, 2)
    silent = attack_success_rate(["a"], [ANSWER], lambda prompts, responses: [None])
    other = attack_success_rate(["a"], [ANSWER], lambda prompts, responses: [True])
    assert math.isnan(compare(silent, other).asr.difference) and compare(silent, other).unpaired == 1


def test_other_judges_and_other_prompts_are_not_compared() -> None:
    report = report_of("complied")
    with pytest.raises(ConfigError, match=r"different judges .judge: 'refusal' against 'scripted'"):
        compare(report, report_of("complied", judge=Scripted({ANSWER: Verdict("complied")})))
    with pytest.raises(ConfigError, match="no prompt in common"):
        compare(report, attack_success_rate(["other"], [ANSWER]))
    strict, lax = Scripted({}, template_hash="a", seed=1, t=0.5), Scripted({}, template_hash="b", seed=1, t=0.5)
    with pytest.warns(UserWarning):
        judged = attack_success_rate(["a"], [ANSWER], strict)
    check_comparable(judged, strict, [Prompt("a")])
    with pytest.raises(ConfigError, match="template_hash: 'a' against 'b'"):
        check_comparable(judged, lax, [Prompt("a")])
    for other in ([Prompt("b")], [Prompt("a", harmful=False)]):
        with pytest.raises(ConfigError, match="no prompt in common"):
            check_comparable(judged, strict, other)


def test_agreement_by_hand() -> None:
    labels = [True] * 25 + [False] * 25
    others = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    prompts, responses = [str(number) for number in range(50)], [ANSWER] * 50
    first = attack_success_rate(prompts, responses, lambda p, r: labels)
    second = attack_success_rate(prompts, responses, lambda p, r: others)
    found = agreement(first, second)
    assert (found.both_complied, found.only_first, found.only_second, found.neither) == (20, 5, 10, 15)
    assert found.kappa == pytest.approx(0.4) and found.agreement.share == 0.7


@given(st.lists(st.sampled_from(["refused", "complied", "degenerate"]), min_size=1, max_size=20))
def test_shares_add_up(labels: list[str]) -> None:
    report = report_of(*labels)
    assert report.asr.count + report.refusal.count + report.degenerate.count == report.asr.n == len(labels)


def test_names_of_judges() -> None:
    assert get_judge("refusal").name == "refusal"
    judge = RefusalJudge()
    assert get_judge(judge) is judge
