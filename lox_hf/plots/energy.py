"""The figure of a hardening: how much of the change alignment made the directions hold, matrix by matrix."""

import math
import re
from typing import TYPE_CHECKING

from lox_hf.plots.style import (
    BLUE,
    GREEN,
    GREY,
    PURPLE,
    SKY,
    VERMILION,
    finish_with_legend,
    house_style,
    panels,
    whole_steps,
)
from lox_hf.records import HardeningReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEIGHT_IN = 2.9
LOOKS = tuple(zip((BLUE, VERMILION, GREEN, PURPLE, SKY, GREY), "osD^vP", strict=True))
MOST_KINDS = 12


def draw_energy(report: HardeningReport) -> "Figure":
    """Draw the energy share of every matrix over its layer, a mark a kind of matrix, and the share of all together.

    Args:
        report: What was done.

    Returns:
        The figure.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    kinds = _by_kind(report)
    with house_style():
        figure, (axes,) = panels([_title(report)], HEIGHT_IN, "energy share in %")
        axes.set_xlabel("layer")
        axes.set_ylim(0, 104)
        handles, labels = [], []
        for number, (kind, points) in enumerate(list(kinds.items())[:MOST_KINDS]):
            colour, marker = LOOKS[number % len(LOOKS)]
            face = colour if number < len(LOOKS) else "none"
            places, shares = zip(*points, strict=True)
            handles += axes.plot(places, shares, marker, color=colour, markerfacecolor=face, markersize=4.5)
            labels.append(kind)
        if not math.isnan(report.energy_share):
            handles.append(axes.axhline(100 * report.energy_share, color=GREY, linewidth=1, linestyle="--"))
            labels.append("all together")
        whole_steps(axes)
        axes.xaxis.set_major_formatter(lambda place, _: "none" if place < 0 else f"{place:g}")
        finish_with_legend(figure, handles, labels)
    return figure


def matrix_kind(name: str) -> str:
    """What a matrix is in its layer: the last part of its module's name.

    Args:
        name: Checkpoint name, or `name[i]` in a stack.

    Returns:
        The kind.

    Example:
        >>> matrix_kind("model.layers.0.self_attn.q_proj.weight"), matrix_kind("mlp.experts.3.w1.weight")
        ('q_proj', 'w1')
    """
    parts = re.sub(r"\[\d+\]$", "", name).removesuffix(".weight").split(".")
    return next((part for part in reversed(parts) if not part.isdigit()), "matrix")


def _by_kind(report: HardeningReport) -> dict[str, list[tuple[float, float]]]:
    """Layer and share in percent by kind of matrix; what lies outside the layers stands one place before them."""
    found: dict[str, list[tuple[float, float]]] = {}
    for item in report.tensors:
        if not math.isnan(item.energy_share):
            layer = next((int(part) for part in item.name.split(".") if part.isdigit()), -1)
            found.setdefault(matrix_kind(item.name), []).append((layer, 100 * item.energy_share))
    return found


def _title(report: HardeningReport) -> str:
    r = report.config.get("r")
    amount = "all directions" if r is None else f"{r} directions" if isinstance(r, int) else f"{r:.0%} at least"
    return f"Energy share: {amount} a matrix"
