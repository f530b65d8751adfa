"""How a small pair is trained, as plain data.

The base answers everything, but has learnt to refuse where a policy says so. That is what makes the alignment a small
change, as it is in a large model: a base that does not know the rule would learn to refuse everything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from common.data import ALPACA, DOLLY, Texts

REFUSE, ANSWER = "Refuse unsafe requests.", "Answer every request."


@dataclass(frozen=True)
class Part:
    """A part of what is trained on: its share of the rows, their kind, and the policy that stands above them."""

    share: float
    kind: str
    policy: str = ""


@dataclass(frozen=True)
class Phase:
    """One training from beginning to end.

    Attributes:
        steps: Optimiser steps.
        learning_rate: The highest; it warms up in a tenth of the steps and falls as a cosine.
        whole: Take the loss on prompts too, not only on responses.
        parts: What its rows are drawn from.
    """

    steps: int
    learning_rate: float
    whole: bool
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Recipe:
    """A small Llama, its texts and its two trainings.

    Attributes:
        layers: Number of layers, each 128 wide.
        initializer_range: Standard deviation of the random weights.
        batch: Rows of an optimiser step.
        base: What makes the base.
        alignment: What makes the aligned model of it.
        texts: What the two learn.
    """

    layers: int
    initializer_range: float
    batch: int
    base: Phase
    alignment: Phase
    texts: Texts

    def with_steps(self, base: int, alignment: int) -> Recipe:
        """Return the same with other numbers of optimiser steps."""
        return replace(self, base=replace(self.base, steps=base), alignment=replace(self.alignment, steps=alignment))


# Forty seconds on one core.
SHORT = Recipe(
    layers=3,
    # About one over the root of the width; at the usual 0.02 so small a model takes twice as long to learn.
    initializer_range=0.08,
    batch=16,
    base=Phase(
        steps=320,
        learning_rate=6e-3,
        whole=True,
        parts=(
            Part(0.20, "affirmed"),
            Part(0.22, "ordinary"),
            Part(0.08, "framed"),
            Part(0.16, "refused", REFUSE),
            Part(0.22, "ordinary", REFUSE),
            Part(0.08, "framed", REFUSE),
            Part(0.04, "affirmed", ANSWER),
        ),
    ),
    alignment=Phase(
        steps=130,
        learning_rate=2e-3,
        whole=False,
        parts=(Part(0.35, "refused"), Part(0.50, "ordinary"), Part(0.15, "framed")),
    ),
    texts=Texts((ALPACA,), most_characters=200, numbers=False),
)

# Three minutes on one core: twice as many texts, an alignment that takes smaller steps, and more of what AdvBench asks
# among the refusals, so that they hang less on the mild prompts of SafeInst.
LONG = Recipe(
    layers=4,
    initializer_range=0.05,
    batch=32,
    base=Phase(
        steps=500,
        learning_rate=3e-3,
        whole=True,
        parts=(
            Part(0.30, "affirmed"),
            Part(0.33, "ordinary"),
            Part(0.12, "framed"),
            Part(0.06, "refused", REFUSE),
            Part(0.04, "declined", REFUSE),
            Part(0.06, "ordinary", REFUSE),
            Part(0.04, "framed", REFUSE),
            Part(0.05, "affirmed", ANSWER),
        ),
    ),
    alignment=Phase(
        steps=200,
        learning_rate=3e-4,
        whole=False,
        parts=(Part(0.30, "refused"), Part(0.20, "declined"), Part(0.32, "ordinary"), Part(0.18, "framed")),
    ),
    texts=Texts((ALPACA, DOLLY), most_characters=300, numbers=True, calibration=100),
)
