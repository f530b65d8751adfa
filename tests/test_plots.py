"""Figures of a stress test: they show the report's figures, look the same twice, and leave nothing behind."""

import ast
import math
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lox_hf.errors import ConfigError, OutputError
from lox_hf.plots.style import save_figure, shown, svg_text
from lox_hf.records import StressReport
from lox_hf.robustness.findings.wording import role
from lox_hf.robustness.plots import (
    PICTURES,
    Picture,
    asr_against_refusal,
    asr_over_steps,
    before_and_after,
    describe,
    models_of,
    utility_against_asr,
)
from lox_hf.robustness.plots.looks import looks
from lox_hf.robustness.plots.points import cells_of, estimate, estimates_by_step, of_attack, outcomes_by_attack
from lox_hf.statistics import rate
from robustness.reports import MODELS, report_of, run, runs

SOURCES = sorted((Path(__file__).resolve().parents[1] / "lox_hf").rglob("*.py"))
SMALL = ("aligned", "hardened r=2 alpha=1.0", "random r=2 alpha=1.0")


@cache
def small_report(**settings: bool) -> StressReport:
    return report_of(runs(SMALL, ("gsm8k", "alpaca"), (0, 1, 2), **settings))


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def curve(figure, color: str) -> list[tuple[float, float]]:
    """The thick line of one colour on a figure's first panel."""
    lines = [line for line in figure.axes[0].lines if line.get_color() == color and line.get_linewidth() > 2]
    (line,) = [line for line in lines if len(line.get_xdata()) > 1]
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_one_seed_has_its_wilson_interval_and_several_are_never_surer() -> None:
    one = rate(3, 100)
    assert estimate([one]) == (one.share, one.low, one.high)
    level = estimate([rate(0, 100)] * 5)
    assert (level.mean, level.low, level.high) == (0.0, 0.0, one.high and rate(0, 100).high)
    spread = estimate([rate(count, 100) for count in (20, 50, 80)])
    # Student's t with 2 degrees of freedom: 4.303 * 0.3 / sqrt(3) = 0.745.
    assert (spread.mean, spread.low, spread.high) == (0.5, 0.0, 1.0)
    pair = estimate([rate(count, 1000) for count in (490, 510)] + [rate(500, 1000)])
    assert pair.low == pytest.approx(0.5 - max(4.3027 * 0.01 / math.sqrt(3), 0.031), abs=2e-3)


def test_what_was_not_scored_is_not_drawn() -> None:
    assert math.isnan(estimate([rate(0, 0)]).mean) and estimate([rate(0, 0), rate(1, 2)]).mean == 0.5
    first, second = run("aligned", seed=0), run("aligned", seed=1, steps=(0, 4, 8))
    assert list(estimates_by_step([first, second], lambda reading: reading.asr)) == [0, 4, 8]
    assert estimates_by_step([first], lambda reading: reading.strict_asr) == {}
    assert estimates_by_step([], lambda reading: reading.asr) == {}


def test_aligned_first_hardened_second_controls_last() -> None:
    report = report_of(runs(("random r=2 alpha=1.0", "hardened r=2 alpha=1.0", "aligned"), ("alpaca",), (0, 1)))
    assert models_of(report) == ["aligned", "hardened r=2 alpha=1.0", "random r=2 alpha=1.0"]
    (outcomes,) = outcomes_by_attack(report).values()
    assert [outcome.model for outcome in outcomes] == models_of(report)
    assert [role(name) for name in ("aligned", "hardened r=6 alpha=1", "hardenedx", "expo alpha=1")] == [
        *("aligned", "hardened", "control", "control")
    ]


def test_no_two_models_look_alike() -> None:
    names = ["aligned", *(f"hardened r={r} alpha=1" for r in range(12)), *(f"random r={r}" for r in range(12))]
    found = looks(names)
    assert len({(look.color, look.marker, str(look.dash)) for look in found.values()}) == len(names)
    # On grey paper line and marker have to do.
    few = looks(tuple(MODELS))
    assert len({(look.marker, str(look.dash)) for look in few.values()}) == len(MODELS)


def test_a_curve_is_the_mean_of_the_runs_at_the_worst_learning_rate() -> None:
    report = small_report()
    figure = asr_over_steps(report)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["gsm8k", "alpaca"]
    outcome = next(own for own in report.outcomes if (own.model, own.attack) == (SMALL[1], "gsm8k"))
    cells = cells_of(report, outcome)
    assert {cell.learning_rate for cell in cells} == {outcome.learning_rate} and len(cells) == 3
    drawn = curve(figure, looks(SMALL)[SMALL[1]].color)
    expected = [
        (step, 100 * sum(cell.readings[number].asr.share for cell in cells) / 3)
        for number, step in enumerate(reading.step for reading in cells[0].readings)
    ]
    assert drawn == [pytest.approx(point) for point in expected]


def test_seeds_and_bands_are_drawn_but_for_controls() -> None:
    few, enough = (report_of(runs(SMALL, ("gsm8k",), range(n))) for n in (4, 5))
    for report, bands in ((few, 0), (enough, 2)):
        axes = asr_over_steps(report).axes[0]
        thin = [line for line in axes.lines if line.get_linewidth() < 1 and len(line.get_xdata()) > 2]
        assert len(thin) == 2 * len(report.seeds) and len(axes.collections) == bands
        read = " ".join(picture.reading(report) for picture in PICTURES)
        assert (read.count("95 % intervals"), "Ticks: each seed" in read) == (bands, not bands)


def test_the_curve_against_refusal_begins_where_the_model_does() -> None:
    report = small_report()
    drawn = curve(asr_against_refusal(report), looks(SMALL)[SMALL[1]].color)
    assert drawn[0][0] == pytest.approx(41) and drawn[-1][0] < 10 < 90 < drawn[-1][1]


def test_bars_show_before_and_after() -> None:
    report = of_attack(small_report(), "gsm8k")
    axes = before_and_after(report).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [shown(model, 30) for model in SMALL]
    widths = [bar.get_width() for bar in axes.patches]
    finals = [100 * outcome.final_asr.mean for outcome in outcomes_by_attack(report)["gsm8k"]]
    assert widths[1::2] == pytest.approx(finals) and max(widths[::2]) < 5


def test_utility_is_drawn_with_the_guard_where_a_model_lost_it() -> None:
    kept = utility_against_asr(small_report()).axes[0]
    assert kept.get_xlim()[0] == pytest.approx(76)
    cells = [run(model, utility=0.2 if model != "aligned" else 0.9) for model in SMALL]
    lost = utility_against_asr(report_of(cells)).axes[0]
    assert lost.get_xlim()[0] < 25 and [patch.get_x() for patch in lost.patches] == [-10]
    # Collapsed seeds are in this figure, and in no other.
    assert any(line.get_xdata()[0] < 25 and line.get_ydata()[0] > 0 for line in lost.lines)
    words = [PICTURES[-1].reading(report) for report in (small_report(), report_of(cells))]
    assert ["shaded" in text for text in words] == [False, True]
    bars = before_and_after(report_of(cells)).axes[0]
    assert [text.get_text() for text in bars.texts].count("not counted") == 2


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_two_renderings_are_byte_equal_whatever_the_users_style(picture: Picture) -> None:
    import matplotlib

    report = small_report()
    first = svg_text(picture.draw(report))
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": None, "axes.grid": False, "text.usetex": True}):
        before = dict(matplotlib.rcParams)
        figure = picture.draw(report)
        second, third = svg_text(figure), svg_text(figure)
        assert dict(matplotlib.rcParams) == before
    assert first == second == third
    assert svg_text(picture.draw(of_attack(report, "gsm8k"))) != first


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_names_stay_text(picture: Picture) -> None:
    names = ("aligned", "hardened $x^{2$ <b>&", "_hidden \x1b[31m")
    report = report_of(runs(names, ("$\\frac{<script>x</script>", "b"), (0, 1)))
    svg = svg_text(picture.draw(report))
    found = " ".join(texts(svg))
    assert "<script" not in svg and "\x1b" not in svg and "$\\frac{<script>x</script>" in found
    assert "hardened $x^{2$ <b>&" in found and "_hidden [31m" in found


def test_long_names_are_wrapped() -> None:
    name = "hardened " + "x" * 400
    assert [len(line) <= 34 for line in shown(name).split("\n")] == [True] * 3 and shown(name).endswith("...")
    assert shown(" \n ") == "(no name)" and shown("aligned") == "aligned"


def test_nothing_lies_outside_the_figure() -> None:
    long = ("aligned", "hardened r=6 alpha=1.25 attention only, layers 0 to 15, and more", "refusal-matched to 41 %")
    report = report_of(runs(long, ("custom:/home/someone/a/long/folder/" + "pairs" * 8, "b", "c"), (0, 1)))
    for picture in PICTURES:
        figure = picture.draw(report)
        svg_text(figure)  # lays it out
        width, height = figure.get_size_inches() * figure.dpi
        boxes = [axes.get_tightbbox() for axes in figure.axes] + [own.get_window_extent() for own in figure.legends]
        # A pixel for rounding.
        assert all(box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1 for box in boxes)
        below, axes = boxes[-1], boxes[:-1]
        assert all(below.y1 < box.y0 for box in axes)


@pytest.mark.parametrize(
    ("draw", "reason"),
    [
        (asr_against_refusal, "no harmless prompts were asked"),
        (utility_against_asr, "utility was not measured"),
    ],
    ids=["refusal", "utility"],
)
def test_what_was_not_measured_is_said_and_not_drawn(draw, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        draw(small_report(benign=False, utility=False))
    assert draw(small_report()).axes


@pytest.mark.parametrize("draw", [asr_over_steps, before_and_after], ids=["steps", "bars"])
def test_a_report_without_runs_is_said(draw) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        draw(replace(small_report(), cells=()))


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'lox-hf\[plot\]'"):
        asr_over_steps(small_report())


def test_a_figure_in_words_has_its_figures() -> None:
    report = small_report()
    words = {picture.name: describe(picture, report) for picture in PICTURES}
    half = report.outcomes[0].half_life.mean
    assert f"gsm8k: aligned 50 % after {half:.1f} steps" in words["asr-over-steps"]
    assert "aligned begins at 23 % refused" in words["asr-against-refusal"]
    assert "1 % before and 97 % after" in words["before-and-after"]
    assert "of utility and" in words["utility-against-asr"]


def test_saved_as_png_and_svg(tmp_path: Path) -> None:
    png, svg = save_figure(asr_over_steps(small_report()), tmp_path / "figures" / "alpha=1.25")
    assert (png.name, svg.name) == ("alpha=1.25.png", "alpha=1.25.svg")
    assert png.read_bytes().startswith(b"\x89PNG") and "aligned" in texts(svg.read_text())
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        save_figure(asr_over_steps(small_report()), tmp_path / "file" / "name")


def test_importing_loads_no_matplotlib_and_drawing_no_pyplot() -> None:
    code = (
        "import sys, lox_hf.robustness.plots, lox_hf.robustness.report; print('matplotlib' in sys.modules); "
        "from lox_hf.plots.style import house_style, panels, svg_text\n"
        "with house_style(): svg_text(panels(['a'], 1.0)[0])\n"
        "print('matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "True", "False"]


def runs_matplotlib(source: str) -> bool:
    """Whether a source file imports matplotlib when it runs; what only a type checker reads does not count."""
    nodes = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
        if any((name or "").partition(".")[0] == "matplotlib" for name in names):
            return True
        types_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        nodes += node.orelse if types_only else ast.iter_child_nodes(node)
    return False


def test_one_package_imports_matplotlib() -> None:
    users = [path for path in SOURCES if runs_matplotlib(path.read_text())]
    assert users and {path.parent.name for path in users} == {"plots"}
    assert {path.parent.parent.name for path in users} == {"lox_hf"}
    # The control: a type checker's import is none, the same import in a function is one.
    line = "from matplotlib.axes import Axes"
    assert not runs_matplotlib(f"if TYPE_CHECKING:\n    {line}") and runs_matplotlib(f"def draw():\n    {line}")
