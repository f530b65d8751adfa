"""`lox-hf landscape` as a user runs it: what it prints and writes, its figure, and one line for every mistake."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file

import zoo
from analysis.corner_models import change, moved
from lox_hf.errors import ConfigError
from lox_hf.plots.landscape import draw_landscape, save_landscape_plot
from lox_hf.plots.style import svg_text
from lox_hf.records import Landscape, Score
from robustness.tiny_pair import make_model, save_pair, write_rows

Run = Callable[..., tuple[int, str, str]]
MEASURING = ("--prompts", "prompts.jsonl", "--max-new-tokens", 14, "--device", "cpu")


def save_moved(folder: Path, name: str, like: str, size: float) -> None:
    """A copy of a model with all its weights moved a little."""
    shutil.copytree(folder / like, folder / name)
    state = zoo.read_checkpoint(folder / like)
    tuned = moved(state, (1.0, change(state, 7, size)))
    save_file(tuned, folder / name / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pair, both a little moved, and a landscape of the four with its files."""
    folder = tmp_path_factory.mktemp("template")
    save_pair(folder)
    write_rows(folder)
    save_moved(folder, "aligned-tuned", "aligned", 0.01)
    save_moved(folder, "base-tuned", "base", 0.01)
    make_model(hidden_size=16).save_pretrained(folder / "larger")
    return folder


def test_four_models(here: Path, run: Run) -> None:
    models = ("aligned", "base", "aligned-tuned", "base-tuned")
    words = ("landscape", "--models", *models, "--grid", "3x2", *MEASURING, "--output", "out")
    code, out, err = run(*words)
    found = Landscape.from_json((here / "out" / "landscape.json").read_text())
    assert code == 0 and "Written to out" in out and not err.replace("lox-hf: warning", "").count("error")
    assert [model.name for model in found.models] == list(models)
    # The same change was made to both, so that the four lie in one plane.
    assert all(model.beside < 1e-4 for model in found.models) and not found.warnings
    rates = [model.score.value("asr") for model in found.models]
    assert rates[0] == 0 and rates[1] == 1  # the aligned model refuses what the base answers
    assert (len(found.xs), len(found.ys), len(found.points)) == (3, 2, 6)
    assert found.about["judge"] == "refusal" and found.about["dtype"] == "float32"
    for text in ("m1  ", "VISAGE", "random", "0.0 % [0.0, 32.4] of 8", "100.0 %"):
        assert text in out
    report = (here / "out" / "report.md").read_text()
    assert "![The landscape](landscape.png)" in report and "m1's tokenizer" in report and "| m4 |" in report
    written = {path.relative_to(here): path.read_bytes() for path in (here / "out").rglob("*") if path.is_file()}
    code, again, _ = run(*words, "--json")  # nothing is left to do, and the same is written
    assert code == 0 and Landscape.from_json(again) == found
    assert {
        path.relative_to(here): path.read_bytes() for path in (here / "out").rglob("*") if path.is_file()
    } == written
    drawn = save_landscape_plot(found, here / "drawn")
    assert [path.read_bytes() for path in drawn] == [written[Path(f"out/landscape.{kind}")] for kind in ("png", "svg")]


def test_two_models_from_a_file_of_options(here: Path, run: Run) -> None:
    (here / "o.yaml").write_text(
        "models: [aligned, base]\ngrid: 4\nmargin: 0\nprompts: [prompts.jsonl]\nmax_new_tokens: 14\ndevice: cpu\n"
    )
    code, out, _ = run("landscape", "--config", "o.yaml")
    found = Landscape.from_json((here / "aligned-landscape" / "landscape.json").read_text())
    assert code == 0 and found.ys == (0.0,) and found.xs[0] == 0 and found.xs[-1] == found.models[1].x
    assert [found.points[at].score.value("asr") for at in (0, -1)] == [0.0, 1.0]
    assert found.points[0].score == found.models[0].score  # the model itself, not measured again
    assert sorted(path.name for path in (here / "aligned-landscape" / "models").iterdir()) == ["m1.json", "m2.json"]
    assert len(list((here / "aligned-landscape" / "points").iterdir())) == 2
    assert "y by x" not in out and "beside" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--models", "aligned"), "1 models are named, expected 2"),
        ((), "0 models are named, expected 2"),
        (("--models", "aligned", "base", "--grid", "7by7"), "--grid takes numbers of points such as 7x7"),
        (("--models", "aligned", "base", "--grid", "1", "--margin", "nan"), "margin is nan"),
        (("--models", "aligned", "base", "--revisions", "a"), "1 revisions are named for 2 models"),
        (("--models", "aligned", "aligned"), "hold the same weights"),
        (("--models", "aligned", "larger"), "The models do not fit together"),
        (("--models", "aligned", "nowhere/there/is"), "nowhere/there/is"),
        (("--models", "aligned", "base", "--output", "base"), "holds something else"),
        (("--models", "aligned", "base", "--config", "model.yaml"), "unknown key 'model'"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(here: Path, run: Run, words: tuple[str, ...], message: str) -> None:
    (here / "model.yaml").write_text("model: aligned\n")
    before = sorted(path.name for path in here.rglob("*"))
    code, out, err = run("landscape", *words, *MEASURING)
    assert (code, out) == (2, "") and message in err.splitlines()[-1] and "Traceback" not in err
    assert sorted(path.name for path in here.rglob("*")) == before


def made(**changes: object) -> Landscape:
    """A landscape of a figure with a slope, over three by two points."""
    from lox_hf.records import GridPoint, PlacedModel

    xs, ys = (0.0, 1.0, 2.0), (0.0, 1.0)
    points = tuple(GridPoint(x, y, Score(figures={"loss": x + y})) for x in xs for y in ys)
    models = tuple(
        PlacedModel(f"org/model-{x:g}{y:g}", x, y, beside, Score(figures={"loss": x + y}))
        for x, y, beside in ((0.0, 0.0, 0.0), (2.0, 0.0, 0.0), (0.0, 1.0, 0.5), (2.0, 1.0, 0.0))
    )
    return replace(Landscape(models, xs, ys, points, 10, "loss"), **changes)


def test_the_figure_says_what_was_measured() -> None:
    text = svg_text(draw_landscape(made()))
    for words in ("loss", "org/model-20, itself 2", "(projected: 0.5 beside)", "Frobenius norm", "m1", "m4"):
        assert words in text
    assert text.count("beside)") == 1 and "(%)" not in text
    with pytest.raises(ConfigError, match="'asr' was not measured"):
        draw_landscape(made(), "asr")


def test_figures_of_what_is_flat_or_partly_unknown() -> None:
    points = made().points
    for value in (1.0, math.nan):
        some = (replace(points[0], score=Score(figures={"loss": value})), *points[1:])
        assert svg_text(draw_landscape(made(points=some)))
    flat = tuple(replace(point, score=Score(figures={"loss": 1.0})) for point in points)
    assert svg_text(draw_landscape(made(points=flat)))
    nothing = tuple(replace(point, score=Score(figures={"loss": math.nan})) for point in points)
    with pytest.raises(ConfigError, match="not measured"):
        draw_landscape(made(points=nothing))


def test_json_keeps_everything() -> None:
    found = made(warnings=("a",), about={"n": 1})
    assert Landscape.from_json(found.to_json()) == found
    assert json.loads(found.to_json())["measure"] == "loss"
