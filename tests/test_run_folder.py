"""The folder of a run: nothing is lost by a kill, nothing foreign is touched, two runs do not mix."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lox_hf.errors import OutputError
from lox_hf.run_folder import RUN_NAME, Journal, RunFolder, differences

SETTINGS = {"model": "a", "tokens": 60, "layers": (1, 2)}


def filled(folder: Path, n: int = 3) -> bytes:
    """Write a run of n items and return the journal's bytes."""
    with RunFolder(folder, SETTINGS) as run:
        run.keep(batch_size=8)
        journal = run.journal("items.jsonl")
        for position in range(n):
            journal.add(position, {"text": f"item {position}\n"})
    return (folder / "items.jsonl").read_bytes()


def items(folder: Path) -> dict[int, dict[str, str]]:
    with RunFolder(folder, SETTINGS) as run:
        return dict(run.journal("items.jsonl").items)


def test_a_run_goes_on(tmp_path: Path) -> None:
    filled(tmp_path / "run")
    with RunFolder(tmp_path / "run", SETTINGS) as run:
        assert run.kept == {"batch_size": 8}  # what the first process found
        journal = run.journal("items.jsonl")
        assert list(journal.items) == [0, 1, 2]
        journal.add(3, {"text": "new"})
        journal.add(0, {"text": "the first one stays"})
    assert items(tmp_path / "run")[3] == {"text": "new"} and items(tmp_path / "run")[0] == {"text": "item 0\n"}


def test_a_line_that_was_cut_is_dropped_at_every_length(tmp_path: Path) -> None:
    data = filled(tmp_path / "whole")
    starts = [0, *(number + 1 for number, byte in enumerate(data) if byte == 10)]
    for length in range(len(data) + 1):
        folder = tmp_path / f"cut-{length}"
        filled(folder, 0)
        (folder / "items.jsonl").write_bytes(data[:length])
        kept = sum(start <= length for start in starts[1:])
        assert list(items(folder)) == list(range(kept))
        with RunFolder(folder, SETTINGS) as run:  # and what is added stands on a line of its own
            run.journal("items.jsonl").add(9, {"text": "after"})
        assert list(items(folder)) == [*range(kept), 9]


@given(st.text(st.characters(), max_size=40))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("journal") / "items.jsonl"
    journal = Journal(path)
    journal.add(0, {"text": text})
    journal.close()
    again = Journal(path)
    assert again.items == {0: {"text": text}}
    again.close()


def test_lone_surrogates_come_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "items.jsonl")
    journal.add(0, {"text": "a\ud800b\x85\u2028"})
    journal.close()
    assert Journal(tmp_path / "items.jsonl").items[0]["text"] == "a\ud800b\x85\u2028"


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    filled(tmp_path / "run")
    path = tmp_path / "run" / "items.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"position": 1', b'"positi', 1))
    with pytest.raises(OutputError, match=r"items.jsonl is damaged in line 2"):
        items(tmp_path / "run")


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    filled(tmp_path / "run")
    with (
        pytest.raises(OutputError, match=r"tokens: 60 there, 61 now; layers: \[1, 2\] there, \[1\] now"),
        RunFolder(tmp_path / "run", {"model": "a", "tokens": 61, "layers": (1,)}),
    ):
        pass
    assert len(items(tmp_path / "run")) == 3  # control: the same settings go on


@pytest.mark.parametrize("content", ["{}", "[]", "no JSON", '{"settings": 3, "kept": {}}'])
def test_a_damaged_run_file(content: str, tmp_path: Path) -> None:
    filled(tmp_path / "run")
    (tmp_path / "run" / RUN_NAME).write_text(content)
    with pytest.raises(OutputError, match=r"run.json is not a run's settings"):
        items(tmp_path / "run")


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match=r"holds something else \(thesis.tex\)"), RunFolder(tmp_path, {}):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_differs_is_said_in_words() -> None:
    hashes = ["0123456789abcdef", "fedcba9876543210"]
    there, now = (
        {"weights": {"aligned": hashes[0], "base": found}, "measure": {"n": n, "judge": "refusal", "rows": found}}
        for found, n in zip(hashes, (8, 9), strict=True)
    )
    assert differences(there, now) == (
        "the weights of base have changed since, or are of another model; measure.n: 8 there, 9 now; "
        "measure.rows: its content has changed since"
    )
    assert differences(there, there) == ""
    assert differences({"a": {"b": 1}}, {"a": None}) == "a: {'b': 1} there, None now"
    assert len(differences({"a": "x" * 9000}, {})) < 700


def test_a_file_in_the_way_and_a_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(OutputError, match="cannot be written"), RunFolder(folder, {}):
            pass
    assert (tmp_path / "file").read_text() == "mine"


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", SETTINGS):
        with pytest.raises(OutputError, match="Another run is writing"), RunFolder(tmp_path / "run", SETTINGS):
            pass
        # The failed one has not taken the first one's lock away.
        with pytest.raises(OutputError, match="Another run is writing"), RunFolder(tmp_path / "run", SETTINGS):
            pass
    assert items(tmp_path / "run") == {}  # control: afterwards it is free


def test_a_killed_process_leaves_its_lines_and_no_lock(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from lox_hf.run_folder import RunFolder
with RunFolder(sys.argv[1], {"model": "a", "tokens": 60, "layers": [1, 2]}) as run:
    journal = run.journal("items.jsonl")
    journal.add(0, {"text": "kept"})
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert items(tmp_path / "run") == {0: {"text": "kept"}}


def test_a_run_that_got_nowhere_gives_its_folder_back(tmp_path: Path) -> None:
    filled(tmp_path / "run", 0)
    with RunFolder(tmp_path / "run", SETTINGS | {"tokens": 100}) as run:
        run.journal("items.jsonl").add(0, {"text": "mine"})
    with pytest.raises(OutputError, match="tokens: 100 there, 60 now"):
        items(tmp_path / "run")


def test_whole_files_appear_complete(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", SETTINGS) as run:
        run.write("report.json", "first")
        run.write("report.json", "second")
    assert (tmp_path / "run" / "report.json").read_text() == "second"
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


def test_in_memory_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with RunFolder(None, SETTINGS) as run:
        run.keep(batch_size=4)
        journal = run.journal("items.jsonl")
        journal.add(0, {"text": "kept"})
        run.write("report.json", "text")
        assert journal.items == {0: {"text": "kept"}} and run.kept == {"batch_size": 4}
    assert os.listdir(tmp_path) == []


def test_a_disk_that_takes_no_more_is_one_error_and_loses_nothing(tmp_path: Path) -> None:
    code = """
import resource, sys
from lox_hf.errors import OutputError
from lox_hf.run_folder import RunFolder
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    with RunFolder(sys.argv[1], {"model": "a", "tokens": 60, "layers": [1, 2]}) as run:
        journal = run.journal("items.jsonl")
        for position in range(100):
            journal.add(position, {"text": "x" * 90})
except OutputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("cannot be written: File too large") == 1, done.stderr
    assert list(items(tmp_path / "run")) == list(range(16))  # 16 whole lines fit into 2,000 bytes


def test_a_fresh_journal_drops_what_is_there(tmp_path: Path) -> None:
    filled(tmp_path / "run")
    with RunFolder(tmp_path / "run", SETTINGS) as run:
        assert run.journal("items.jsonl", fresh=True).items == {}
    assert items(tmp_path / "run") == {}


def test_the_settings_are_readable(tmp_path: Path) -> None:
    filled(tmp_path / "run")
    assert json.loads((tmp_path / "run" / RUN_NAME).read_text())["settings"]["tokens"] == 60
