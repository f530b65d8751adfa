"""One style for all figures: how they look, and how a figure becomes a file."""

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lox_hf.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1b1b1f"
GREY = "#767676"
"""As dark as text has to be on white, and as light as it has to be on black."""
# Okabe and Ito, Color Universal Design, 2008: told apart with any colour vision. Line and marker do it on grey paper.
VERMILION, BLUE, GREEN, PURPLE, SKY = "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9"
DPI = 200
PANEL_WIDTH_IN = 4.8
LEGEND_ROW_IN = 0.2
PERCENT = (-4, 104)
"""Limits of an axis in percent, with room beside 0 and 100 so that a marker there is whole."""
QUARTERS = (0, 25, 50, 75, 100)
MEASURES = {
    "asr": "attack success rate",
    "asr_mean": "mean ASR along the attack",
    "over_refusal": "harmless prompts refused",
    "degenerate": "degenerate answers",
    "accuracy": "known answers given",
    "gsm8k": "GSM8K accuracy",
    "kl": "KL divergence from the aligned model (nats)",
}
"""What measures are called in figures."""
RC = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.alpha": 0.12,
    "grid.color": INK,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
    # Ids in an SVG file are random without it.
    "svg.hashsalt": "lox_hf",
    "text.color": INK,
    # A name is not mathematics, whatever dollar signs are in it.
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


def shown(name: str, width: int = 34) -> str:
    """Return a name as a figure can show it: printable, in lines of limited length, three at most.

    Args:
        name: Any text.
        width: Characters in a line.

    Returns:
        The text; a leading underscore, which hides a legend's entry, has an invisible character before it.
    """
    clean = "".join(character for character in " ".join(name.split()) if character.isprintable())
    lines = textwrap.wrap(clean, width, max_lines=3, placeholder=" ...") or ["(no name)"]
    return ("\u200b" if lines[0].startswith("_") else "") + "\n".join(lines)


@contextmanager
def house_style() -> Iterator[None]:
    """Draw in the house style, whatever the user's own style is, which is back afterwards.

    Yields:
        Nothing.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    try:
        from matplotlib import style
    except ImportError as error:
        raise ConfigError("Figures need matplotlib: pip install 'lox-hf[plot]'.") from error
    with style.context(["default", RC]):
        yield


def panels(
    titles: Sequence[str], height_in: float, y_label: str = "", title_width: int = 48
) -> tuple["Figure", list["Axes"]]:
    """Make a figure of panels, two in a row at most.

    Args:
        titles: Title of every panel.
        height_in: Height of a panel in inches.
        y_label: Label of the y axis, which the panels of a row share.
        title_width: Characters in a line of a title.

    Returns:
        The figure and its panels in the order of the titles.
    """
    from matplotlib.figure import Figure

    columns = min(2, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(PANEL_WIDTH_IN * columns, height_in * rows))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid[:, 0]:
        axes.set_ylabel(y_label)
    found = list(grid.flatten())
    for axes, title in zip(found, titles, strict=False):
        axes.set_title(shown(title, title_width))
    for empty in found[len(titles) :]:
        empty.remove()
    return figure, found[: len(titles)]


def whole_steps(axes: "Axes") -> None:
    """Mark whole numbers only on a panel's x axis."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def measure_name(name: str) -> str:
    """Return what a measure is called in figures; one of a user's own by its name."""
    return MEASURES.get(name, name)


def check_matplotlib() -> None:
    """Refuse to begin what could not be drawn in the end.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    with house_style():
        pass


def swatch(face: str, edge: str) -> "Artist":
    """Return a small rectangle for a legend: what it is filled with, and its outline."""
    from matplotlib.patches import Patch

    return Patch(facecolor=face, edgecolor=edge)


def finish_with_legend(figure: "Figure", handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Finish a figure: put one legend below all panels, in as many columns as fit, and lay everything out.

    Args:
        figure: The figure.
        handles: What the legend explains; where there is nothing, there is no legend.
        labels: In which words.
    """
    if handles:
        _add_legend(figure, handles, [shown(label) for label in labels])
    # Laid out once: every further time would begin from the last and move things a little.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def svg_text(figure: "Figure") -> str:
    """Return a figure as the text of an SVG file; the same figure gives the same bytes.

    Args:
        figure: The figure.

    Returns:
        The file's text. Its letters are text, so they can be found and read aloud.
    """
    return _bytes(figure, "svg").decode()


def save_figure(figure: "Figure", stem: str | Path) -> tuple[Path, Path]:
    """Write a figure as PNG and SVG.

    Args:
        figure: The figure.
        stem: Where, without a suffix; its folder is made where it is missing.

    Returns:
        The two files.

    Raises:
        OutputError: If they cannot be written.
    """
    stem = Path(stem)
    # Not `with_suffix`, which would take a part of "alpha=1.25" away.
    files = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        for file in files:
            file.write_bytes(_bytes(figure, file.suffix[1:]))
    except OSError as error:
        raise OutputError(f"The figure {stem} cannot be written: {error.strerror or error}.") from error
    return files


def _add_legend(figure: "Figure", handles: Sequence[Any], names: Sequence[str]) -> None:
    width, height = figure.get_size_inches()
    # A character at 9 points is about 0.075 inches wide; handle and gaps take 0.75.
    entry_in = 0.075 * max(len(line) for name in names for line in name.split("\n")) + 0.75
    columns = max(1, min(len(names), int(width / entry_in)))
    per_column = -(-len(names) // columns)
    lines = per_column * max(name.count("\n") + 1 for name in names)
    figure.set_size_inches(width, height + LEGEND_ROW_IN * lines)
    figure.legend(handles, names, loc="outside lower center", ncols=columns)


def _bytes(figure: "Figure", kind: str) -> bytes:
    """A figure as a file, without its date and the version that drew it."""
    metadata = {"svg": dict.fromkeys(("Date", "Creator", "Format", "Type")), "png": {"Software": None}}
    buffer = io.BytesIO()
    with house_style():
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata[kind])
    return buffer.getvalue()
