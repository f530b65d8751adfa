"""What is wrong with the arguments of `LoxCallback`, all at once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lox_hf.config import LoxConfig
from lox_hf.subspace import SafetySubspace
from lox_hf.training.thresholds import NEEDS, Threshold, is_count, is_finite

ACTIONS = ("log", "stop", "reapply")


def setting_problems(
    subspace: Any, action: Any, threshold: Threshold, given: dict[str, Any], harden_after: Any
) -> list[str]:
    """Return what is out of range, contradicts another argument, or has no effect.

    Args:
        subspace: Directions, or settings of them.
        action: What is done.
        threshold: When.
        given: `every_n_steps`, `strength`, `base_model` and `probe`; None where they are left out.
        harden_after: Whether the model is hardened at the end, and not watched.

    Returns:
        A clause for each problem.

    Example:
        >>> setting_problems(LoxConfig(), "halt", Threshold(), {}, False)
        ["action is 'halt', expected one of log, stop, reapply"]
    """
    return [
        *_subspace_problems(subspace, harden_after),
        *_action_problems(action, threshold, given.get("strength")),
        *threshold.problems(),
        *_reading_problems(threshold, given),
        *(_harden_problems(action, threshold, given) if harden_after else ()),
    ]


def _subspace_problems(subspace: Any, harden_after: Any) -> Iterator[str]:
    if not isinstance(subspace, SafetySubspace | LoxConfig | str | Path):
        yield (
            f"subspace is a SafetySubspace, the folder or Hub id of one, or a LoxConfig, got {type(subspace).__name__}"
        )
    elif harden_after and not isinstance(subspace, LoxConfig):
        yield "harden_after takes a LoxConfig: directions are found when the training has ended"
    if not isinstance(harden_after, bool):
        yield f"harden_after is {harden_after!r}, expected True or False"


def _action_problems(action: Any, threshold: Threshold, strength: Any) -> Iterator[str]:
    if action not in ACTIONS:
        yield f"action is {action!r}, expected one of {', '.join(ACTIONS)}"
    if action == "stop" and not threshold.is_set:
        yield "action 'stop' needs a threshold: pass below or above"
    if strength is not None and not (is_finite(strength) and strength > 0):
        yield f"strength is {strength!r}, expected a positive number: less takes alignment away"
    if strength is not None and action != "reapply":
        yield "strength is for action 'reapply'"
    if threshold.patience != 1 and not threshold.is_set:
        yield "patience needs a threshold: pass below or above"


def _reading_problems(threshold: Threshold, given: dict[str, Any]) -> Iterator[str]:
    every = given.get("every_n_steps")
    if every is not None and not is_count(every):
        yield f"every_n_steps is {every!r}, expected a positive integer, or None for each epoch"
    needed = NEEDS.get(threshold.metric) if isinstance(threshold.metric, str) else None
    if needed and given.get(needed) is None:
        yield f"metric {threshold.metric!r} needs {needed}"
    probe = given.get("probe")
    if probe is not None and (isinstance(probe, type) or not hasattr(probe, "read")):
        got = f"the class {probe.__name__}" if isinstance(probe, type) else type(probe).__name__
        yield f"probe is a SafetyProbe, got {got}"


def _harden_problems(action: Any, threshold: Threshold, given: dict[str, Any]) -> Iterator[str]:
    set_too = [name for name, value in given.items() if value is not None and name != "base_model"]
    set_too += ["action"] if action != "log" else []
    set_too += ["below or above"] if threshold.is_set else []
    if set_too:
        yield f"harden_after does not watch the training, and so takes no {', '.join(set_too)}"
