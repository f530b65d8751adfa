"""Who has which colour, line and marker in the figures of a stress test."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from lox_hf.plots.style import BLUE, GREEN, GREY, PURPLE, SKY, VERMILION
from lox_hf.robustness.findings.wording import Role, role

ALIGNED = VERMILION
HARDENED = (BLUE, GREEN, PURPLE, SKY)
# The numbers of colours, dashes and markers have no common divisor, so that pairs of them come again late.
SOLID: Any = "solid"
DASHES: tuple[Any, ...] = ((0, (1, 1.2)), (0, (4, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)))
HARDENED_MARKERS = "sD^vp"
CONTROL_MARKERS = "XP<>dph8"


class Look(NamedTuple):
    """How one model is drawn in every figure.

    Attributes:
        color: Of its line, its marker and its bars.
        dash: Its line, in matplotlib's terms.
        marker: Its marker.
        width: Line width in points.
        order: Higher ones lie on top.
        prominent: It is no control: its seeds and intervals are drawn along a curve too.
    """

    color: str
    dash: Any
    marker: str
    width: float
    order: float
    prominent: bool


def ordered(models: Iterable[str]) -> list[str]:
    """Sort models as a reader wants them: the aligned one, the hardened ones, the controls.

    Args:
        models: Names of the models; a name may come more than once.

    Returns:
        Every name once; within a role in the order in which they came.
    """
    roles: tuple[Role, ...] = ("aligned", "hardened", "control")
    return sorted(dict.fromkeys(models), key=lambda model: roles.index(role(model)))


def looks(models: Sequence[str]) -> dict[str, Look]:
    """Give every model its colour, line and marker.

    Args:
        models: Names of the models in their order.

    Returns:
        A look per model; no two are alike for up to 20 hardened models and 40 controls.
    """
    hardened = [model for model in models if role(model) == "hardened"]
    controls = [model for model in models if role(model) == "control"]
    found = {"aligned": Look(ALIGNED, (0, (5, 1.5)), "o", 2.0, 3, True)}
    for number, model in enumerate(hardened):
        marker = HARDENED_MARKERS[number % len(HARDENED_MARKERS)]
        found[model] = Look(HARDENED[number % len(HARDENED)], SOLID, marker, 2.2, 4, True)
    for number, model in enumerate(controls):
        marker = CONTROL_MARKERS[number % len(CONTROL_MARKERS)]
        found[model] = Look(GREY, DASHES[number % len(DASHES)], marker, 1.1, 2, False)
    return {model: found[model] for model in models}
