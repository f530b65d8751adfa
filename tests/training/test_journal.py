"""Readings on disk: one strict line each, whole or not there, and no more of them than the run goes on from."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lox_hf.errors import CheckpointError, OutputError
from lox_hf.records import DriftReading, ProbeReading, TensorDrift, TrainingReading
from lox_hf.statistics import rate
from lox_hf.training.journal import Journal, first_of_steps
from training.callback_runs import lines, make_subspace


def reading(step: int, retention: float = 0.5, moment: str = "step") -> TrainingReading:
    tensors = (TensorDrift("a.weight", retention), TensorDrift("b.weight", math.nan))
    return TrainingReading(step, step / 10, moment, DriftReading(retention, tensors=tensors))


def steps(readings: list[TrainingReading]) -> list[int]:
    return [item.step for item in readings]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path)
    journal.restart()
    return journal


def test_a_line_is_strict_json_with_the_values_of_every_matrix(journal: Journal, tmp_path: Path) -> None:
    journal.append(reading(3))
    (line,) = lines(tmp_path)  # refuses NaN
    assert line["step"] == 3
    assert line["drift"]["tensors"][1] == {"name": "b.weight", "retention": None, "r_ft": None, "r_align": None}


def test_readings_come_back_as_they_were(journal: Journal) -> None:
    probe = ProbeReading(rate(1, 3), rate(0, 2), refusal_perplexity=math.inf)
    full = TrainingReading(7, 0.7, "save", DriftReading(1 / 3, 0.1, 0.2, 0.3), probe, 0.25, 1.0, True)
    journal.append(full)
    journal.append(reading(8))
    first, second = journal.resume(step=8)
    assert first == full
    assert second == replace(reading(8), drift=replace(reading(8).drift, tensors=())), "matrices stay on disk"


def test_resume_drops_what_came_after_the_step(journal: Journal, tmp_path: Path) -> None:
    for step in (0, 2, 4, 6):
        journal.append(reading(step))
    assert steps(journal.resume(step=4)) == [0, 2, 4]
    assert [line["step"] for line in lines(tmp_path)] == [0, 2, 4]
    assert steps(Journal(tmp_path).resume(step=99)) == [0, 2, 4]


def test_a_line_that_a_kill_cut_short_is_dropped(journal: Journal, tmp_path: Path) -> None:
    for step in (0, 2):
        journal.append(reading(step))
    path = tmp_path / "lox" / "readings.jsonl"
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for end in (start, start + 1, len(whole) - 40, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert steps(journal.resume(step=9)) == [0]
        assert len(lines(tmp_path)) == 1, "and what is appended next begins on a line of its own"
    path.write_bytes(whole)
    assert steps(journal.resume(step=9)) == [0, 2], "the control: nothing was cut"


@pytest.mark.parametrize("damage", ["{", "[]", '"text"', "{}", "\x00\x00"])
def test_damage_elsewhere_is_named(journal: Journal, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "lox" / "readings.jsonl"
    journal.append(reading(0))
    path.write_text(damage + "\n" + path.read_text())
    with pytest.raises(CheckpointError, match=r"Line 1 of .*readings\.jsonl is no reading"):
        journal.resume(step=9)


def test_resume_without_a_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.resume(step=3) == []
    journal.append(reading(4))
    assert [line["step"] for line in lines(tmp_path)] == [4]


def test_restart_removes_an_older_run_and_nothing_else(journal: Journal, tmp_path: Path) -> None:
    folder = tmp_path / "lox"
    journal.append(reading(0))
    journal.restart(make_subspace(), {"a.weight": torch.eye(2)})
    assert sorted(item.name for item in folder.iterdir()) == ["readings.jsonl", "start.safetensors", "subspace"]
    (folder / "notes.txt").write_text("mine")
    Journal(tmp_path).restart()
    # Directions go when others take their place: they may be the ones that the user passes.
    assert sorted(item.name for item in folder.iterdir()) == ["notes.txt", "readings.jsonl", "subspace"]
    assert lines(tmp_path) == []


def test_start_coordinates_come_back(journal: Journal) -> None:
    wanted = {"a.weight": torch.randn(2, 2, dtype=torch.float64).T, "b[1]": torch.zeros(0, 0, dtype=torch.float64)}
    journal.restart(start=wanted)
    found = journal.load_start()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors"])
def test_missing_or_damaged_start_says_what_to_do(journal: Journal, content: bytes | None) -> None:
    if content is not None:
        (journal.folder / "start.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="Pass strength"):
        journal.load_start()


def test_only_one_process_writes(tmp_path: Path) -> None:
    other = Journal(tmp_path, writes=False)
    other.restart(make_subspace(), {"a": torch.eye(1)})
    other.append(reading(0))
    assert other.resume(step=0) == []
    assert not list(tmp_path.iterdir())


def test_a_reading_process_gets_what_the_other_wrote(journal: Journal, tmp_path: Path) -> None:
    journal.append(reading(0))
    journal.append(reading(5))
    assert steps(Journal(tmp_path, writes=False).resume(step=3)) == [0]
    assert len(lines(tmp_path)) == 2


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "lox").write_text("a file")
    with pytest.raises(OutputError, match="lox"):
        Journal(tmp_path).restart()


def test_of_two_readings_at_a_step_a_checkpoint_holds_the_first() -> None:
    readings = [reading(0), reading(4, 0.7), reading(4, 0.9, "end")]
    assert [item.drift.retention for item in first_of_steps(readings)] == [0.5, 0.7]


def test_a_line_has_no_line_breaks(journal: Journal, tmp_path: Path) -> None:
    journal.append(TrainingReading(0, 0.0, "begin", DriftReading(1.0, tensors=(TensorDrift("a\nb", 1.0),))))
    text = (tmp_path / "lox" / "readings.jsonl").read_text()
    assert text.count("\n") == 1
    assert json.loads(text)["drift"]["tensors"][0]["name"] == "a\nb"
