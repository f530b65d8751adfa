"""Judges of responses, and the way from a name to one."""

from collections.abc import Callable, Sequence
from typing import Any

from lox_hf.errors import ConfigError
from lox_hf.evaluation.judges.base import Judge
from lox_hf.evaluation.judges.function import FunctionJudge
from lox_hf.evaluation.judges.refusal import RefusalJudge

JudgeLike = Judge | str | Callable[[Sequence[str], Sequence[str]], Sequence[Any]]
KNOWN = '"refusal", "classifier:ID" (a Hub id or folder) or "rubric:MODEL" (at an OpenAI-compatible endpoint)'


def get_judge(judge: JudgeLike) -> Judge:
    """Return the judge that is meant.

    Args:
        judge: A judge, its name, or a function of prompts and responses.

    Returns:
        The judge.

    Raises:
        ConfigError: If no judge has this name, or what is given is none.

    Example:
        >>> get_judge("refusal").name
        'refusal'
    """
    if isinstance(judge, str):
        return _named(judge)
    if isinstance(judge, Judge):
        return judge
    if callable(judge):
        return FunctionJudge(judge)
    raise ConfigError(f"A judge is a name, {KNOWN}, a Judge, or a function; got {type(judge).__name__}.")


def _named(name: str) -> Judge:
    kind, _, target = name.partition(":")
    if name == "refusal":
        return RefusalJudge()
    if kind == "classifier" and target:
        from lox_hf.evaluation.judges.classifier import ClassifierJudge

        return ClassifierJudge(target)
    if kind == "rubric" and target:
        from lox_hf.evaluation.judges.rubric import RubricJudge

        return RubricJudge.from_endpoint(target)
    raise ConfigError(f"There is no judge '{name}': known are {KNOWN}.")
