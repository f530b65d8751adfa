"""The stress test as a whole: every piece is a file that is made once, and what is added leaves the rest untouched."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lox_hf.config import LoxConfig
from lox_hf.errors import OutputError, PromptError
from lox_hf.records import StressReport
from lox_hf.robustness import cells, prepare
from lox_hf.robustness.controls import ControlTraining
from lox_hf.robustness.matrix import open_matrix
from lox_hf.robustness.settings import StressConfig
from lox_hf.robustness.stress import stress_test
from lox_hf.run_folder import RunFolder
from robustness.tiny_pair import HARDENED, attack, config, save_pair, without_figures, write_rows
from test_bad_input import contents, nothing_lost

RATES = (3e-3, 1e-3)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with without_figures():
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    save_pair(folder)
    return write_rows(folder)


@pytest.fixture(scope="module")
def first(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest test, finished."""
    folder = tmp_path_factory.mktemp("first") / "run"
    stress_test(config(pair), folder)
    return folder


@pytest.fixture
def run(first: Path, tmp_path: Path) -> Path:
    """A copy of it, times of the files included."""
    return Path(shutil.copytree(first, tmp_path / "run"))


@pytest.fixture
def nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something is trained")

    monkeypatch.setattr(cells, "fine_tune", refuse)
    monkeypatch.setattr(prepare, "retrain", refuse)
    monkeypatch.setattr(prepare, "match_refusals", refuse)


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every cell and measurement with the time at which it was written."""
    found = [path for name in ("before", "cells") for path in (folder / name).rglob("*.json")]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def results(folder: Path) -> bytes:
    return (folder / "results.json").read_bytes()


def test_everything_is_there_and_nothing_else(first: Path) -> None:
    assert {path.name for path in first.iterdir()} == {
        *("before", "cells", "prepared", "report.html", "report.md", "results.json", "run.json")
    }
    hardened = "hardened-r=2-alpha=0.25"
    assert set(files(first)) == {
        *(f"before/{model}/seed-0.json" for model in ("aligned", hardened)),
        *(f"cells/pairs/{model}/lr-0.003/seed-0.json" for model in ("aligned", hardened)),
    }
    assert not [*first.rglob("*.safetensors"), *first.rglob(".*")]  # weights are dropped, and nothing is half done
    report = StressReport.from_json(results(first).decode())
    assert report.to_json().encode() == results(first)
    for cell in report.cells:
        assert [reading.step for reading in cell.readings] == [0, 2, 3]
        assert (cell.readings[0].asr.share, cell.readings[-1].asr.n, cell.task_after.accuracy.n) == (0.0, 8, 2)
        assert cell.readings[-1].asr.share > 0.5  # control: the attack works
        assert cell.drift_after.retention != cell.drift_before.retention
    assert [cell.model for cell in report.cells] == ["aligned", "hardened r=2 alpha=0.25"]
    assert report.cells[0].drift_before.retention == pytest.approx(1.0, abs=1e-4)
    assert report.cells[1].drift_before.retention == pytest.approx(1 + HARDENED.alpha, abs=1e-3)
    assert report.settings["attacks"]["pairs"]["rows"] == 18 and len(report.not_run) == 6


@pytest.mark.usefixtures("nothing_is_trained")
def test_a_finished_run_trains_nothing_and_says_the_same(pair: Path, run: Path, first: Path) -> None:
    before = files(run)
    report = stress_test(config(pair), run)
    assert files(run) == before and contents(run) == contents(first)
    assert report.to_json().encode() == results(run)
    with pytest.raises(AssertionError, match="something is trained"):  # control
        stress_test(config(pair, learning_rates=RATES), run)


ADDITIONS: dict[str, Any] = {
    "seed": lambda pair: {"seeds": [0, 1]},
    "attack": lambda pair: {"attacks": [attack(pair, "few", n=4), attack(pair)]},
    "learning rate": lambda pair: {"learning_rates": RATES},
    "hardened": lambda pair: {"hardened": [HARDENED, LoxConfig(r=1, alpha=1.0)]},
    "control": lambda pair: {"controls": ["random"]},
}


@pytest.mark.parametrize("addition", ADDITIONS)
def test_what_is_added_leaves_the_rest_untouched(addition: str, pair: Path, run: Path, tmp_path: Path) -> None:
    before = files(run)
    larger = config(pair, **ADDITIONS[addition](pair))
    report = stress_test(larger, run)
    after = files(run)
    assert before.items() < after.items() and len(report.cells) > 2
    stress_test(larger, tmp_path / "fresh")
    assert results(run) == results(tmp_path / "fresh")


CHANGES: dict[str, tuple[Any, str]] = {
    "readings": (lambda pair: {"readings": 3}, "readings: 2 there, 3 now"),
    "longest answer": (lambda pair: {"max_new_tokens": 5}, "max_new_tokens: 14 there, 5 now"),
    "prompts": (lambda pair: {"n": 12}, "prompts: '16, sha256 .* there, '12, sha256 .* now"),
    "settings of SFT": (lambda pair: {"sft": {"max_steps": 2}}, r"attack\.sft\.max_steps: 3 there, 2 now\)"),
    "rows": (
        lambda pair: {"attacks": [attack(pair, n=4)]},
        r"attack\.data: its content has changed since; attack\.n: None there, 4 now\)",
    ),
    "LoRA": (lambda pair: {"lora": {"r": 1}}, r"attack\.lora: None there, \{'r': 1\} now\)"),
    "directions of the drift": (
        lambda pair: {"hardened": [LoxConfig(r=1), HARDENED]},
        r"drift_along\.r: 2 there, 1 now",
    ),
    "dtype": (lambda pair: {"dtype": "bfloat16"}, "dtype: 'auto' there, 'bfloat16' now"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("nothing_is_trained")
def test_other_settings_for_what_is_there_are_refused(change: str, pair: Path, run: Path) -> None:
    changes, told = CHANGES[change]
    before = files(run)
    with pytest.raises(OutputError, match=rf"with other settings \({told}") as caught:
        stress_test(config(pair, **changes(pair)), run)
    assert str(run) in str(caught.value) and "choose another folder, or take back the change" in str(caught.value)
    assert before.items() <= files(run).items()


@pytest.mark.usefixtures("nothing_is_trained")
def test_another_model_under_the_same_name_is_refused(pair: Path, run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(pair, tmp_path / "pair"))
    stress_test(config(other), run)  # control: the same model under another name
    save_pair(other, seed=1)
    told = r"with other settings \(the weights: another model's\)"
    with nothing_lost(run), pytest.raises(OutputError, match=told):
        stress_test(config(other), run)


@pytest.mark.usefixtures("nothing_is_trained")
def test_a_damaged_cell_is_named_with_what_to_do(pair: Path, run: Path) -> None:
    path = run / "cells/pairs/aligned/lr-0.003/seed-0.json"
    path.write_text(path.read_text()[:100])
    told = f"{path} is damaged: remove it, and the run makes it anew"
    with nothing_lost(run), pytest.raises(OutputError, match=told):
        stress_test(config(pair), run)


def test_a_cell_that_was_removed_is_made_anew(pair: Path, run: Path, first: Path) -> None:
    path = run / "cells/pairs/aligned/lr-0.003/seed-0.json"
    path.unlink()
    stress_test(config(pair), run)
    assert contents(run) == contents(first)


def test_a_folder_that_holds_something_else_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("precious")
    nowhere = StressConfig("nowhere", "nowhere", ["gsm8k"])  # nothing of it can be found
    with nothing_lost(tmp_path), pytest.raises(OutputError, match=r"thesis holds something else \(chapter.txt\)"):
        stress_test(nowhere, tmp_path / "thesis")


def test_a_folder_that_another_run_is_writing_is_refused(pair: Path, run: Path) -> None:
    with (
        RunFolder(run, {"run": "stress test"}),
        nothing_lost(run),
        pytest.raises(OutputError, match="Another run is writing"),
    ):
        stress_test(config(pair), run)


def test_seeds_that_do_not_scan_meet_the_worst_learning_rate_with_pairs_of_their_own(
    pair: Path, tmp_path: Path
) -> None:
    for seed in (0, 1):
        save_pair(tmp_path / f"pair-{seed}", seed)
    rows = {"attacks": [attack(pair)], "prompts": [pair / "prompts.jsonl"]}
    settings = {"learning_rates": RATES, "seeds": [0, 1], "scan_seeds": 1}
    report = stress_test(config(tmp_path / "pair-{seed}", **settings | rows), tmp_path / "run")
    assert len(report.cells) == 2 * (2 + 1)
    worst = {outcome.model: outcome.learning_rate for outcome in report.outcomes}
    met = {(cell.model, cell.learning_rate, cell.seed) for cell in report.cells}
    assert met == {(model, rate, 0) for model in worst for rate in RATES} | {(*item, 1) for item in worst.items()}
    assert worst["aligned"] == 3e-3  # the lower one hardly attacks
    assert report.aligned.name_or_path == str(tmp_path / "pair-{seed}" / "aligned")
    assert report.seeds == (0, 1)
    weights = {json.loads(path.read_text())["settings"]["weights"] for path in (tmp_path / "run").rglob("seed-*.json")}
    assert len(weights) == 2
    assert not (tmp_path / "run" / "work").exists()


TRAINING = ControlTraining(
    learning_rate=1e-3, batch_size=4, retrain_steps=2, match_steps=4, every=2, sft={"gradient_checkpointing": False}
)


def test_every_control_is_made_of_what_is_given(pair: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    benign = {
        "hardened": [LoxConfig(r=8, alpha=0.25)],  # it refuses some of the calibration prompts
        "calibration_data": pair / "calibration.jsonl",
        "control_training": TRAINING,
    }
    report = stress_test(config(pair, controls=["retrained"], **benign), run)
    assert [cell.model for cell in report.cells] == ["aligned", "hardened r=8 alpha=0.25", "retrained"]
    before = files(run)
    report = stress_test(config(pair, controls=None, safety_data=pair / "safety.jsonl", **benign), run)
    assert before.items() < files(run).items()
    assert [cell.model for cell in report.cells] == [
        *("aligned", "hardened r=8 alpha=0.25", "expo alpha=0.25", "random r=8 alpha=0.25"),
        *("refusal-matched r=8 alpha=0.25", "safeinst", "rescaled", "retrained"),
    ]
    assert not report.not_run
    (note,) = report.notes
    assert note.startswith("refusal-matched r=8 alpha=0.25, seed 0: ") and "calibration prompts after 4 steps" in note
    by_model = {cell.model: cell for cell in report.cells}
    first_readings = {model: cell.readings[0] for model, cell in by_model.items()}
    assert first_readings["safeinst"] == first_readings["rescaled"] == first_readings["aligned"]
    ends = {model: cell.train_loss for model, cell in by_model.items()}
    assert len(set(ends.values())) == len(ends)  # no two of them are the same model under the same rows
    assert not (run / "work").exists()

    again = config(pair, controls=["retrained"], **benign | {"control_training": replace(TRAINING, retrain_steps=3)})
    told = r"seed-0/retrained.json with other .*retrain_steps: 2 there, 3 now"
    with nothing_lost(run), pytest.raises(OutputError, match=told):
        stress_test(replace(again, seeds=(0, 1)), run)
    other = pair / "other.jsonl"
    other.write_text("".join((pair / "calibration.jsonl").read_text().splitlines(True)[1:]))
    told = r"retrained.json with other settings \(rows: its content has changed since\)"
    with nothing_lost(run), pytest.raises(OutputError, match=told):
        stress_test(config(pair, controls=["retrained"], **benign | {"calibration_data": other}), run)


def test_kept_weights_are_plain_models_whatever_attacked_them(pair: Path, tmp_path: Path) -> None:
    lora = config(pair, lora={"r": 2, "target_modules": ["q_proj", "down_proj"]})
    stress_test(lora, tmp_path / "run")
    dropped = results(tmp_path / "run")
    report = stress_test(replace(lora, keep_weights=True), tmp_path / "run")  # also where the run was finished
    assert results(tmp_path / "run") == dropped and report.settings["attacks"]["pairs"]["lora"]["r"] == 2
    aligned = AutoModelForCausalLM.from_pretrained(pair / "aligned").state_dict()
    for model in ("aligned", "hardened-r=2-alpha=0.25"):
        folder = tmp_path / "run" / "weights" / "pairs" / model / "lr-0.003" / "seed-0"
        assert {"model.safetensors", "config.json", "tokenizer.json"} < {path.name for path in folder.iterdir()}
        kept = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        changed = {name for name, weight in kept.items() if not torch.equal(weight, aligned[name])}
        attacked = {name for name in aligned if "q_proj" in name or "down_proj" in name}
        assert changed == attacked if model == "aligned" else attacked < changed


def test_names_of_attacks_stay_in_the_folder(pair: Path, tmp_path: Path) -> None:
    names = ("../up", "/etc", "…")
    attacks = [attack(pair, name, n=4) for name in names]
    report = stress_test(config(pair, attacks=attacks, sft={"max_steps": 1}, keep_weights=True), tmp_path / "run")
    assert {outcome.attack for outcome in report.outcomes} == set(names)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert len(list((tmp_path / "run" / "weights").iterdir())) == 3


def test_rows_that_change_under_a_run_are_refused(pair: Path, first: Path, tmp_path: Path) -> None:
    rows = tmp_path / "attack.jsonl"
    shutil.copy(pair / "attack.jsonl", rows)
    planned = config(pair, attacks=[replace(attack(pair), data=str(rows))])
    matrix = open_matrix(planned, first / "work")
    kept = json.loads(next((first / "before" / "aligned").glob("*.json")).read_text())
    before = cells.Before.from_dict(kept["result"])
    subject, one = matrix.subjects[0][0], matrix.attacks[0]
    job = cells.CellJob(subject, one.attack, one.rows, 3e-3, 2, matrix.measurement, before)
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(PromptError, match="'pairs' were changed"):
        job.run()
