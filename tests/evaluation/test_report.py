"""Tables of a report, for terminals and in Markdown: complete, aligned, and safe from what is in them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lox_hf import agreement, attack_success_rate, compare
from lox_hf.evaluation.data.prompts import Prompt
from lox_hf.evaluation.judges.function import FunctionJudge
from lox_hf.evaluation.report import escape, render_markdown, render_screen, render_text, report_rows
from lox_hf.records import SafetyReport, SafetyRun, Verdict

REFUSAL = "I'm sorry, but I can't help with that."
ANSWER = "Take the brush to the attic."
ATTACK = "<img src=x onerror=alert(1)> | [a](javascript:x) `c` \x1b[31m\nrow"


def report_of(prompts: list[Prompt], *, judge: object = "refusal") -> SafetyReport:
    responses = [REFUSAL if number % 2 else ANSWER for number in range(len(prompts))]
    return attack_success_rate(prompts, responses, judge)  # type: ignore[arg-type]


def cells(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line)) - 1


def test_a_rate_over_nothing_is_not_known_and_not_zero() -> None:
    with pytest.warns(UserWarning):
        report = attack_success_rate(["a"], [ANSWER], lambda prompts, responses: [None])
    (row,) = [row for row in report_rows(report) if row[0] == "attack success rate"]
    assert row == ("attack success rate", "not known", "", "", "0", "1")
    for page in (render_screen(SafetyRun((report,))), render_markdown(SafetyRun((report,)))):
        assert "not known" in page and "could not say" in page


def test_rows_that_say_nothing_are_left_out() -> None:
    harmful = [row[0] for row in report_rows(report_of([Prompt("a"), Prompt("b")]))]
    assert harmful == ["", "attack success rate", "refused", "degenerate"]
    both = [row[0] for row in report_rows(report_of([Prompt("a"), Prompt("b", False, reference="x")]))]
    assert "over-refusal (harmless prompts refused)" in both and "harmless and the known answer given" in both


def test_a_rubric_has_its_scores_and_its_note() -> None:
    judge = FunctionJudge(lambda prompts, responses: [Verdict("complied", score=5), Verdict("refused", score=2)])
    report = attack_success_rate(["a", "b"], [ANSWER, ANSWER], judge)
    page = render_screen(SafetyRun((report,)))
    assert "score 4 or 5" in page and "mean score, 1 to 5" in page and "3.50" in page
    assert "need not be a refusal" in page and "need not be" not in render_screen(
        SafetyRun((report_of([Prompt("a")]),))
    )


def test_columns_are_aligned() -> None:
    lines = render_text(report_rows(report_of([Prompt(str(number)) for number in range(120)]))).splitlines()
    ends = {line.rstrip()[-1] for line in lines[1:]}
    assert len({len(line) for line in lines}) == 1 and ends == {"0"}


def test_what_is_in_a_table_cannot_leave_it() -> None:
    prompts = [Prompt("a", category=ATTACK), Prompt("b", category=ATTACK)]
    judge = FunctionJudge(lambda p, r: [Verdict("unscored", ATTACK), Verdict("complied")])
    report = attack_success_rate(prompts, [ANSWER, ANSWER], judge)
    page = render_markdown(SafetyRun((report,)))
    assert "<img" not in page and "\x1b" not in page and "javascript" in page  # it is shown, as text
    assert "https:" not in escape("https://example.org www.example.org @user $x$") and "@" not in escape("@user")
    for block in re.findall(r"(?:^\|.*\n?)+", page, re.MULTILINE):
        assert len({cells(line) for line in block.splitlines()}) == 1
    screen = render_screen(SafetyRun((report,)))
    assert "\x1b" not in screen and "<img" in screen


@given(st.text(max_size=60))
def test_escaped_text_is_one_cell(text: str) -> None:
    line = f"| {escape(text)} |"
    assert cells(line) == 1 and "\n" not in line and "<" not in line and not re.search(r"(?<!\\)[`*_\[\]]", line)


def test_all_parts_of_a_run_are_on_the_page() -> None:
    prompts = [Prompt("a", category="c"), Prompt("b", category="d")]
    first = report_of(prompts)
    second = report_of(prompts, judge=lambda p, r: [True, True])
    found = agreement(first, second)
    run = SafetyRun((first, second), (found,), compare(first, first))
    page = render_markdown(run)
    assert page.count("## Judge: ") == 2 and "Cohen's kappa" in page and "does not make a model safe" in page
    assert "Against the earlier run" in page
    screen = render_screen(run)
    assert "p (McNemar)" in screen and "Against the earlier run" in screen and max(map(len, screen.splitlines())) < 121
