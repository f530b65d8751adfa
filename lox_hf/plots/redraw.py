"""Figures again from the records that commands wrote: the same record gives the same bytes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lox_hf.errors import ConfigError
from lox_hf.plots.drift import draw_drift
from lox_hf.plots.landscape import draw_landscape
from lox_hf.plots.layers import draw_layer_map
from lox_hf.plots.rank_curve import draw_rank_curve
from lox_hf.plots.selection import draw_selection
from lox_hf.plots.style import save_figure
from lox_hf.records import Landscape, LayerMap, RankCurve, Selection, TrainingReading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINES = ".jsonl"
READINGS = "readings"
"""What the lines of a journal are called where every record is one object."""


class Drawable(NamedTuple):
    """A record that can be drawn.

    Attributes:
        name: What it is called in messages.
        fields: Fields that only it has all of.
        draw: From its JSON, and the measure where it has several, to figures by name; a single one is named "".
        stem: Name of the figure's file, or of the folder of several; "" names them as the record's file.
        has_measures: Whether one of several measures can be drawn.
    """

    name: str
    fields: frozenset[str]
    draw: Callable[[dict[str, Any], str | None], "dict[str, Figure]"]
    stem: str = ""
    has_measures: bool = False


DRAWABLES = (
    Drawable(
        "a rank curve",
        frozenset({"points", "aligned_score"}),
        lambda data, measure: {"": draw_rank_curve(RankCurve.from_dict(data), measure)},
        has_measures=True,
    ),
    Drawable(
        "a landscape",
        frozenset({"points", "xs", "ys"}),
        lambda data, measure: {"": draw_landscape(Landscape.from_dict(data), measure)},
        has_measures=True,
    ),
    Drawable(
        "a selection",
        frozenset({"candidates", "limits"}),
        lambda data, _: {"": draw_selection(Selection.from_dict(data))},
    ),
    Drawable(
        "a map by layers",
        frozenset({"entries", "r"}),
        lambda data, _: {"": draw_layer_map(LayerMap.from_dict(data))},
    ),
    Drawable(
        "the readings of a training run",
        frozenset({READINGS}),
        lambda data, _: {"": draw_drift([TrainingReading.from_dict(line) for line in data[READINGS]])},
        stem="drift",
    ),
)


def redraw(
    path: str | Path,
    output: str | Path | None = None,
    measure: str | None = None,
    drawables: Sequence[Drawable] = DRAWABLES,
) -> list[Path]:
    """Draw a record from its file, as PNG and SVG; what it is, its fields say.

    Args:
        path: `rank_curve.json`, `landscape.json`, `selection.json`, `layers.json`, or the `readings.jsonl` of a
            training run, under whatever name.
        output: Where, without a suffix; None puts the figure where the command that made the record did.
        measure: Which of several measures is drawn; None draws the record's own.
        drawables: What can be drawn.

    Returns:
        The files.

    Raises:
        ConfigError: If the file cannot be read, holds no record that can be drawn, or not this measure; or matplotlib
            is not installed.
        OutputError: If the files cannot be written.

    Example:
        >>> redraw("curve/rank_curve.json")  # doctest: +SKIP
        [PosixPath('curve/rank_curve.png'), PosixPath('curve/rank_curve.svg')]
    """
    path = Path(path).expanduser()
    data = _read(path)
    found = next((item for item in drawables if item.fields <= data.keys()), None)
    if found is None:
        known = ", ".join(item.name for item in drawables)
        fields = ", ".join(map(repr, list(data)[:5])) or "no fields"
        raise ConfigError(f"Cannot draw {path}: it holds {fields}, and what can be drawn is {known}.")
    if measure is not None and not found.has_measures:
        raise ConfigError(f"--measure {measure} would do nothing: {path} is {found.name}; leave it out.")
    try:
        figures = found.draw(data, measure)
    except ConfigError as error:  # a ValueError too, but it says what is wrong itself
        raise ConfigError(f"Cannot draw {path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"Cannot draw {path}: it looks like {found.name}, but is none that can be read "
            f"({type(error).__name__}: {error}). Was it changed by hand, or cut short?"
        ) from error
    stem = Path(output).expanduser() if output is not None else path.with_name(found.stem or path.stem)
    return [file for name, figure in figures.items() for file in save_figure(figure, stem / name if name else stem)]


def _read(path: Path) -> dict[str, Any]:
    """The fields of a record; lines are readings, the last of which a kill may have cut short."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == LINES:
            readings = [json.loads(line) for line in text.split("\n")[:-1]]
            is_journal = readings and all(
                isinstance(line, dict) and {"step", "drift"} <= line.keys() for line in readings
            )
            return {READINGS: readings} if is_journal else {}
        data = json.loads(text)
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise ConfigError(f"Cannot draw {path}: it is no JSON ({error}).") from error
    return data if isinstance(data, dict) else {}
