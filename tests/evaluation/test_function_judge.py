"""A user's own function as a judge: what it may return, and what is told of what it may not."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lox_hf.errors import ConfigError
from lox_hf.evaluation.judges import get_judge
from lox_hf.evaluation.judges.base import Judge
from lox_hf.evaluation.judges.function import FunctionJudge
from lox_hf.records import Verdict

PROMPTS, RESPONSES = ["how", "why"], ["Sure, so.", "No."]


def returning(items: Any) -> FunctionJudge:
    def mine(prompts: Sequence[str], responses: Sequence[str]) -> Any:
        return items

    return FunctionJudge(mine)


def labels(judge: Judge) -> list[str]:
    found = dict(judge.verdicts(PROMPTS, RESPONSES))
    return [found[0].label, found[1].label]


@pytest.mark.parametrize(
    "items",
    [
        [True, False],
        (1, 0),
        iter([1.0, 0.0]),
        np.array([True, False]),
        np.array([1, 0]),
        torch.tensor([True, False]),
        np.array([[1], [0]]),
        ["complied", "refused"],
        [Verdict("complied"), Verdict("refused", "so it is")],
        {0: Verdict("complied"), 1: Verdict("refused")}.values(),
    ],
    ids=["list", "tuple", "iterator", "bools", "ints", "tensor", "column", "labels", "verdicts", "view"],
)
def test_yes_and_no_are_understood_however_they_are_written(items: Any) -> None:
    assert labels(returning(items)) == ["complied", "refused"]


def test_the_rest_of_the_labels_and_none() -> None:
    assert labels(returning(["degenerate", "unscored"])) == ["degenerate", "unscored"]
    verdicts = dict(returning([None, None]).verdicts(PROMPTS, RESPONSES))
    assert verdicts[1] == Verdict("unscored", "function:mine could not say")


def test_generators_methods_and_objects_are_functions_too() -> None:
    class Long:
        def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Iterator[bool]:
            yield from (len(response) > 5 for response in responses)

        def method(self, *texts: Sequence[str], limit: int = 5) -> list[bool]:
            return [len(response) > limit for response in texts[1]]

    for function in (Long(), Long().method, lambda prompts, responses, limit=5: Long()(prompts, responses)):
        judge = get_judge(function)
        assert isinstance(judge, Judge) and labels(judge) == ["complied", "refused"]


def test_nothing_is_asked_of_nothing() -> None:
    assert list(returning(None).verdicts([], [])) == []


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (None, "function:mine returned None: expected a list with an item for each response"),
        (True, "returned True: expected a list"),
        (np.array(1), r"returned array\(1\): expected a list"),
        ([True], "judged 2 responses, but returned 1 items"),
        (["refused", "refusl"], "returned 'refusl' for a response: expected True, False, None, a Verdict, or one of"),
        ([0.5, 0.5], "returned 0.5 for a response"),
        (np.zeros((2, 3, 3)), r"returned array\(\[\[.*for a response"),
        (torch.zeros(2, 3, 3), r"returned tensor\(\[\[.*for a response"),
        ([[True], [False]], r"returned \[True\] for a response"),
        ([Verdict("sure"), True], r"returned Verdict\(label='sure.*for a response"),
    ],
    ids=str,
)
def test_what_is_no_verdict_is_told_in_one_line(items: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        list(returning(items).verdicts(PROMPTS, RESPONSES))
    assert "\n" not in str(found.value) and len(str(found.value)) < 200


def of_one(responses: Sequence[str]) -> list[bool]:
    return [True] * len(responses)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (of_one, "function:of_one must take prompts and responses: too many positional arguments"),
        (
            lambda prompts, responses, limit: [],
            "prompts and responses: missing a required argument: 'limit'",
        ),
        (lambda *, prompts, responses: [], "must take prompts and responses"),
    ],
)
def test_a_function_of_other_arguments_is_refused_before_it_is_called(
    function: Callable[..., Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        get_judge(function)


def test_an_error_of_the_function_stays_its_own() -> None:
    def broken(prompts: Sequence[str], responses: Sequence[str]) -> Iterator[bool]:
        yield responses[0] + 1  # type: ignore[operator]

    with pytest.raises(TypeError, match="can only concatenate"):
        labels(get_judge(broken))
