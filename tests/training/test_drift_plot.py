"""The figure of a training run: what was measured is on it, and the training process is as it was."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from lox_hf.errors import ConfigError, OutputError
from lox_hf.plots.drift import draw_drift, save_drift_plot
from lox_hf.plots.style import PURPLE, VERMILION, svg_text
from lox_hf.records import DriftReading, ProbeReading, TrainingReading
from lox_hf.statistics import rate

NAN = math.nan


def reading(step: int, retention: float = NAN, ratio: float = NAN, **rest) -> TrainingReading:
    return TrainingReading(step, step / 10, "step", DriftReading(retention=retention, ratio=ratio), **rest)


def probe(complied: int, refused: int = 1, perplexity: float = NAN) -> ProbeReading:
    return ProbeReading(rate(complied, 20), rate(refused, 10), perplexity)


def full() -> list[TrainingReading]:
    return [
        reading(0, 1.0, 1.0, probe=probe(0, perplexity=1.5)),
        reading(10, 0.9, 0.95),
        reading(20, 0.7, 0.9, probe=probe(8, 0, 4.0), reapplied=0.3, retention_after=1.0, tripped=True),
        reading(30, 0.9, 0.85, probe=probe(12, 0, 6.0)),
    ]


def labels(figure) -> list[str]:
    return [axes.get_ylabel() for axes in figure.axes]


def panel(figure, label: str):
    return figure.axes[labels(figure).index(label)]


def points(axes, marker: str, color: str | None = None) -> list[tuple[float, float]]:
    (line,) = [line for line in axes.lines if line.get_marker() == marker and color in (None, line.get_color())]
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def legend(figure) -> list[str]:
    return [text.get_text() for own in figure.legends for text in own.get_texts()]


def test_what_was_not_measured_has_no_panel() -> None:
    assert labels(draw_drift(full())) == [
        "retention",
        "correction\n/ ||S_k||",
        "R_ft / R_align",
        "share of prompts (%)",
        "perplexity\nof a refusal",
    ]
    assert labels(draw_drift([reading(0, 1.0), reading(10, 0.9)])) == ["retention"]
    assert labels(draw_drift([reading(0, probe=probe(3))])) == ["share of prompts (%)"]


def test_every_reading_is_a_point() -> None:
    figure = draw_drift(full())
    assert points(panel(figure, "retention"), "o") == [(0, 1.0), (10, 0.9), (20, 0.7), (30, 0.9)]
    assert points(panel(figure, "R_ft / R_align"), "D", PURPLE) == [(0, 1.0), (10, 0.95), (20, 0.9), (30, 0.85)]
    answers = panel(figure, "share of prompts (%)")
    # Nothing was asked at step 10: the line goes on.
    assert points(answers, "o", VERMILION) == [(0, 0), (20, pytest.approx(40)), (30, pytest.approx(60))]
    assert points(answers, "s") == [(0, pytest.approx(10)), (20, 0), (30, 0)]
    assert points(figure.axes[-1], "v") == [(0, 1.5), (20, 4.0), (30, 6.0)]
    assert figure.axes[-1].get_xlabel() == "optimiser steps"


def test_the_interval_is_that_of_the_rate() -> None:
    (band,) = panel(draw_drift(full()), "share of prompts (%)").collections
    corners = band.get_paths()[0].vertices
    at_20 = [y for x, y in corners if x == 20]
    asked = rate(8, 20)
    assert (min(at_20), max(at_20)) == pytest.approx((100 * asked.low, 100 * asked.high))


def test_retention_is_read_against_aligned_and_erased() -> None:
    axes = panel(draw_drift([reading(0, 2.25), reading(10, 2.2)]), "retention")
    assert [(text.get_text(), text.get_position()[1]) for text in axes.texts] == [("aligned", 1), ("erased", 0)]
    low, high = axes.get_ylim()
    assert low < 0 and high > 2.25


def test_a_correction_lifts_the_line_and_shows_its_size() -> None:
    figure = draw_drift(full())
    axes = panel(figure, "retention")
    line = next(line for line in axes.lines if line.get_marker() == "None" and len(line.get_xdata()) == 5)
    assert list(zip(line.get_xdata(), line.get_ydata(), strict=True))[2:4] == [(20, 0.7), (20, 1.0)]
    assert points(axes, "^") == [(20, 1.0)]
    assert points(panel(figure, "correction\n/ ||S_k||"), "^") == [(20, 0.3)]
    assert "after the correction" in legend(figure)
    assert "after the correction" not in legend(draw_drift([reading(0, 1.0)]))


def crossings(axes) -> list[float]:
    return [line.get_xdata()[0] for line in axes.lines if line.get_color() == VERMILION and line.get_alpha() == 0.7]


def test_crossings_are_marked_where_they_begin_and_shaded_while_they_last() -> None:
    tripped = [False, True, True, False, True]
    readings = [reading(10 * at, 0.9, 0.9, tripped=own) for at, own in enumerate(tripped)]
    figure = draw_drift(readings)
    for axes in figure.axes:
        assert crossings(axes) == [10, 40]
        assert [(span.get_x(), span.get_width()) for span in axes.patches] == [(10, 10), (40, 0)]
    assert legend(figure) == ["beyond the threshold"]
    calm = draw_drift([reading(0, 0.9)])
    assert not crossings(calm.axes[0]) and not calm.axes[0].patches and not legend(calm)


def test_what_is_not_known_is_a_gap() -> None:
    found = points(panel(draw_drift([reading(0, 1.0), reading(5), reading(10, 0.8)]), "retention"), "o")
    assert [x for x, y in found if math.isnan(y)] == [5] and found[2] == (10, 0.8)
    unscored = ProbeReading(rate(0, 0, unscored=20), rate(1, 10), math.inf)
    answers = panel(draw_drift([reading(0, probe=probe(2)), reading(5, probe=unscored)]), "share of prompts (%)")
    assert math.isnan(points(answers, "o")[1][1]) and points(answers, "s")[1] == (5, 10)


@pytest.mark.parametrize(
    "readings",
    [[reading(0, 1.0)], [reading(0, 1.0, 1.0, probe=probe(0, perplexity=1.0))], full()[2:3], full()],
    ids=["retention", "probe", "correction", "full"],
)
def test_few_readings_are_drawn_inside_the_figure(readings: list[TrainingReading], tmp_path: Path) -> None:
    figure = draw_drift(readings)
    svg_text(figure)  # lays it out
    width, height = figure.get_size_inches() * figure.dpi
    boxes = [own.get_tightbbox() for own in figure.axes] + [own.get_window_extent() for own in figure.legends]
    # A pixel for rounding.
    assert all(box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1 for box in boxes)
    ticks = [text.get_text() for text in figure.axes[-1].get_xticklabels()]
    assert ticks and all(tick.lstrip("\u2212").isdigit() for tick in ticks)


@pytest.mark.parametrize("readings", [[], [reading(0)]], ids=["none", "empty"])
def test_nothing_measured_is_said(readings: list[TrainingReading], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"none of {len(readings)} readings holds a figure"):
        save_drift_plot(readings, tmp_path / "drift")
    assert not list(tmp_path.iterdir())


def test_saved_as_png_and_svg_the_same_twice(tmp_path: Path) -> None:
    save_drift_plot(full(), tmp_path / "lox" / "drift")
    save_drift_plot(full(), tmp_path / "again" / "drift.png")
    save_drift_plot(full(), tmp_path / "again" / "lr=1.5")
    names = sorted(path.name for path in tmp_path.rglob("*.*"))
    assert names == ["drift.png", "drift.png", "drift.svg", "drift.svg", "lr=1.5.png", "lr=1.5.svg"]
    for name in ("drift.png", "drift.svg"):
        assert (tmp_path / "lox" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        save_drift_plot(full(), tmp_path / "file" / "drift")


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'lox-hf\[plot\]'"):
        draw_drift(full())


def test_the_users_style_and_random_numbers_are_left_alone(tmp_path: Path) -> None:
    import matplotlib
    import torch

    with matplotlib.rc_context({"font.size": 30, "axes.grid": False}):
        style, state = dict(matplotlib.rcParams), torch.get_rng_state()
        save_drift_plot(full(), tmp_path / "drift")
        assert dict(matplotlib.rcParams) == style and torch.equal(torch.get_rng_state(), state)


def test_importing_loads_no_matplotlib_and_saving_no_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lox_hf.plots.drift import save_drift_plot\n"
        "from lox_hf.records import DriftReading, TrainingReading\n"
        "print('matplotlib' in sys.modules)\n"
        "save_drift_plot([TrainingReading(0, 0.0, 'begin', DriftReading(retention=1.0))], Path(sys.argv[1]))\n"
        "print('matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code, tmp_path / "drift"], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "True", "False"] and (tmp_path / "drift.png").exists()
