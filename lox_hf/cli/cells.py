"""What commands that measure many models print: measures as cells of tables, settings as rows, sentences."""

import math
import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lox_hf.records import Score

NOT_KNOWN = "not known"


def known(value: float, form: str, otherwise: str = NOT_KNOWN) -> str:
    """Return a number in a format such as ".3g", or other words where it is NaN."""
    return otherwise if math.isnan(value) else format(value, form)


def percent(share: float) -> str:
    """Return a share as per cent."""
    return NOT_KNOWN if math.isnan(share) else f"{100 * share:.1f} %"


def measure_cell(score: "Score", name: str, *, interval: bool = False) -> str:
    """Return a measure: of a rate per cent, or all that is known of it; of a figure the number.

    Args:
        score: What was measured.
        name: The measure.
        interval: Give the interval and n of a rate too.

    Returns:
        The cell.
    """
    rate = score.rates.get(name)
    if rate is None:
        return known(score.value(name), ".3g")
    return str(rate) if interval and rate.n else percent(rate.share)


def about_rows(about: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for every setting of a measure that says something."""
    return [(name.replace("_", " "), str(value)) for name, value in about.items() if value not in (None, [])]


def paragraphs(texts: Iterable[str]) -> list[str]:
    """Return sentences as a terminal shows them: in lines, and without what would move its cursor."""
    from lox_hf.evaluation.report import SCREEN_WIDTH, one_line

    return [textwrap.fill(one_line(text), SCREEN_WIDTH) for text in texts]
