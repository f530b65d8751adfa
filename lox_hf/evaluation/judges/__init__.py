"""Judges of responses, and the way from a name to one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lox_hf.errors import ConfigError
from lox_hf.evaluation.judges.base import Judge
from lox_hf.evaluation.judges.function import FunctionJudge
from lox_hf.evaluation.judges.refusal import RefusalJudge

JudgeLike = Judge | str | Callable[[Sequence[str], Sequence[str]], Sequence[Any]]
KNOWN = '"refusal", "classifier:ID" (a Hub id or folder) or "rubric:MODEL" (at an OpenAI-compatible API, or a folder)'


def get_judge(judge: JudgeLike) -> Judge:
    """Return the judge that is meant.

    Args:
        judge: A judge, its name, or a function of prompts and responses.

    Returns:
        The judge.

    Raises:
        ConfigError: If no judge has this name, or what is given is none.
        CheckpointError: If the files of its model cannot be loaded.

    Example:
        >>> get_judge("refusal").name
        'refusal'
    """
    if isinstance(judge, str):
        return _named(judge)
    if isinstance(judge, type):
        raise ConfigError(f"A judge is an object, got the class {judge.__name__}: pass {judge.__name__}().")
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

        if is_folder(target):
            from lox_hf.evaluation.models.loading import load_model

            return RubricJudge.from_model(*load_model(target))
        return RubricJudge.from_endpoint(target)
    raise ConfigError(f"There is no judge '{name}': known are {KNOWN}.")


def is_folder(target: str) -> bool:
    """Tell a model in a folder from one at an endpoint.

    Args:
        target: What stands after "rubric:".

    Returns:
        Whether it begins as a path does, or there is such a folder.

    Example:
        >>> is_folder("./judge"), is_folder("gpt-4o-mini")
        (True, False)
    """
    return target.startswith((".", "/", "~")) or Path(target).is_dir()
