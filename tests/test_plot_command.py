"""`lox-hf plot`: every record gives the bytes that its command wrote, and what it cannot draw it says."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lox_hf import LoxConfig, SafetySubspace
from lox_hf.analysis.landscape import landscape
from lox_hf.analysis.layers import layer_map
from lox_hf.analysis.rank_curve import rank_curve
from lox_hf.plots.drift import save_drift_plot
from lox_hf.plots.landscape import draw_landscape
from lox_hf.plots.layers import draw_layer_map
from lox_hf.plots.rank_curve import draw_rank_curve
from lox_hf.plots.selection import draw_selection
from lox_hf.plots.style import save_figure
from lox_hf.records import (
    Candidate,
    DriftReading,
    Landscape,
    LayerMap,
    Limit,
    ModelReference,
    RankCurve,
    Score,
    Selection,
    TrainingReading,
)
from lox_hf.robustness.report.render import save_report
from lox_hf.run_folder import RunFolder
from lox_hf.statistics import rate
from robustness.reports import report_of, runs
from test_bad_input import contents

Run = Callable[..., tuple[int, str, str]]


def measure(model: torch.nn.Module) -> dict[str, object]:
    weight = model.weight.detach()
    return {"asr": rate(round(10 * abs(float(weight[0, 0].tanh()))), 20), "length": float(weight.norm())}


def curve() -> RankCurve:
    torch.manual_seed(0)
    aligned, base = (torch.nn.Linear(6, 6, bias=False) for _ in range(2))
    return rank_curve(aligned, base, measure, ranks=(0, 1, 2))


def plane() -> Landscape:
    torch.manual_seed(0)
    corners = [{"weight": torch.randn(6, 6)} for _ in range(4)]
    return landscape(torch.nn.Linear(6, 6, bias=False), corners, measure, grid=(4, 4))


def layers() -> LayerMap:
    torch.manual_seed(0)
    sides = [{f"model.layers.{n}.q.weight": torch.randn(8, 8) for n in range(3)} for _ in range(2)]
    return layer_map(SafetySubspace.from_models(*sides, LoxConfig(r=2)))


def selection() -> Selection:
    scores = [Score({"asr": rate(n, 20), "over_refusal": rate(n, 20)}, {"kl": 0.1 * n}) for n in range(4)]
    found = [
        Candidate(f"r=2 alpha={n}", LoxConfig(r=2, alpha=n).to_dict(), "all", float(n), scores[n]) for n in (1, 2, 3)
    ]
    limits = (Limit("kl", 0.15), Limit("over_refusal", 0.1))
    return Selection(ModelReference("a"), None, scores[0], tuple(found), limits, "strength", recommended="r=2 alpha=1")


RECORDS = {
    "rank_curve": (curve, draw_rank_curve),
    "landscape": (plane, draw_landscape),
    "layers": (layers, draw_layer_map),
    "selection": (selection, draw_selection),
}


@pytest.mark.parametrize("name", RECORDS)
def test_the_same_bytes_from_the_file_as_from_the_record(name: str, tmp_path: Path, run: Run) -> None:
    make, draw = RECORDS[name]
    record = make()
    pictures = save_figure(draw(record), tmp_path / "made" / name)  # pyrefly: ignore[bad-argument-type]
    (tmp_path / f"{name}.json").write_text(record.to_json())
    code, out, err = run("plot", tmp_path / f"{name}.json")
    assert (code, err) == (0, "") and out.split() == [str(tmp_path / picture.name) for picture in pictures]
    for picture in pictures:
        assert (tmp_path / picture.name).read_bytes() == picture.read_bytes()
    # By its fields, whatever its name, and under the name that is asked for: dots in it are no suffix.
    shutil.move(tmp_path / f"{name}.json", tmp_path / "renamed.txt")
    assert run("plot", tmp_path / "renamed.txt", "--output", tmp_path / "new" / "alpha=1.25")[0] == 0
    assert (tmp_path / "new" / "alpha=1.25.png").read_bytes() == pictures[0].read_bytes()


@pytest.mark.parametrize("name", ["rank_curve", "landscape"])
def test_another_measure(name: str, tmp_path: Path, run: Run) -> None:
    (tmp_path / "record.json").write_text(RECORDS[name][0]().to_json())
    pictures = []
    for measure_name in ("asr", "length"):
        assert run("plot", tmp_path / "record.json", "--measure", measure_name)[0] == 0
        pictures.append((tmp_path / "record.svg").read_bytes())
    assert pictures[0] != pictures[1] and b"length" in pictures[1]
    code, _, err = run("plot", tmp_path / "record.json", "--measure", "nothing")
    assert code == 2 and "nothing" in err and "length" in err and "changed by hand" not in err


def test_the_journal_of_a_training_run(tmp_path: Path, run: Run) -> None:
    readings = [TrainingReading(step, step / 10, "step", DriftReading(1 - step / 50)) for step in (0, 5, 10)]
    save_drift_plot(readings, tmp_path / "made")
    lines = [json.dumps(json.loads(reading.to_json())) for reading in readings]
    journal = tmp_path / "readings.jsonl"
    journal.write_text("\n".join(lines) + '\n{"step": 15, "ep')  # cut short by a kill
    code, out, _ = run("plot", journal)
    assert code == 0 and out.split() == [str(tmp_path / "drift.png"), str(tmp_path / "drift.svg")]
    assert (tmp_path / "drift.png").read_bytes() == (tmp_path / "made.png").read_bytes()


def test_the_figures_of_a_stress_test(tmp_path: Path, run: Run) -> None:
    report = report_of(runs(("aligned", "hardened r=2 alpha=1.0"), ("alpaca",), (0, 1)))
    with RunFolder(tmp_path / "run", {}) as folder:
        save_report(report, folder)
    (tmp_path / "again").mkdir()
    shutil.copy(tmp_path / "run" / "results.json", tmp_path / "again")
    code, out, _ = run("plot", tmp_path / "again" / "results.json")
    made = contents(tmp_path / "run" / "figures")
    assert code == 0 and len(out.split()) == len(made) > 2
    assert contents(tmp_path / "again" / "figures") == made


@pytest.mark.parametrize(
    ("file", "text", "options", "message"),
    [
        ("none.json", None, "", "Cannot read"),
        ("broken.json", '{"points": [', "", "is no JSON"),
        ("list.json", "[1, 2]", "", "it holds no fields"),
        (
            "other.json",
            '{"tensors": [], "copied": 3}',
            "",
            "'tensors', 'copied', and what can be drawn is a rank curve",
        ),
        ("layers.json", '{"entries": 3, "r": 6}', "", "looks like a map by layers, but is none"),
        ("layers.json", '{"entries": [], "r": 6, "aligned": {"name_or_path": "a"}}', "", "changed none of 0 matrices"),
        ("layers.json", '{"entries": [], "r": 6}', "--measure asr", "--measure asr would do nothing"),
        ("empty.jsonl", "", "", "it holds no fields"),
        ("results.jsonl", '{"prompt": "x"}\n', "", "it holds no fields"),
    ],
)
def test_what_cannot_be_drawn(
    file: str, text: str | None, options: str, message: str, tmp_path: Path, run: Run
) -> None:
    if text is not None:
        (tmp_path / file).write_text(text)
    before = contents(tmp_path)
    code, out, err = run("plot", tmp_path / file, *options.split())
    assert (code, out) == (2, "") and err.startswith("lox-hf: error: ") and message in err and file in err
    assert contents(tmp_path) == before


def test_an_output_that_cannot_be_written(tmp_path: Path, run: Run) -> None:
    (tmp_path / "layers.json").write_text(layers().to_json())
    (tmp_path / "file").write_text("mine")
    code, _, err = run("plot", tmp_path / "layers.json", "--output", tmp_path / "file" / "layers")
    assert code == 2 and "cannot be written" in err and (tmp_path / "file").read_text() == "mine"


def test_a_record_without_what_newer_versions_add(tmp_path: Path, run: Run) -> None:
    data = replace(layers(), tuned="").to_dict() | {"added_later": 1}
    (tmp_path / "layers.json").write_text(json.dumps(data))
    assert run("plot", tmp_path / "layers.json")[0] == 0
