"""Jobs of a long run: done once, kept as files, the same in any number of processes, and gone when their run is."""

import errno
import json
import os
import signal
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lox_hf.errors import ConfigError, LoxError, OutputError
from lox_hf.jobs import Runner
from lox_hf.records import JsonRecord
from lox_hf.run_folder import RunFolder
from lox_hf.workers import Workers

WORKERS = pytest.mark.parametrize("workers", [None, 2])


@dataclass(frozen=True)
class Found(JsonRecord):
    value: float
    threads: int = 0
    process: int = 0


@dataclass(frozen=True)
class Square:
    """Squares a number, and leaves a line behind whenever it is done."""

    number: float
    diary: Path
    trouble: str = ""
    leaves: Path | None = None

    @property
    def path(self) -> str:
        return f"squares/of-{abs(self.number)}.json"

    def settings(self) -> dict[str, Any]:
        return {"number": self.number, "power": 2}

    def run(self) -> Found:
        with self.diary.open("a") as diary:
            diary.write(f"{self.number}\n")
        if self.leaves is not None:
            self.leaves.mkdir()
        if self.trouble == "warns":
            warnings.warn("squares grow", stacklevel=1)
        if self.trouble == "fails":
            raise ConfigError(f"{self.number} cannot be squared.")
        if self.trouble == "dies":
            os._exit(7)
        if self.trouble == "lasts":
            time.sleep(600)
        return Found(self.number**2, torch.get_num_threads(), os.getpid())

    def read(self, data: dict[str, Any]) -> Found:
        return Found.from_dict(data)


@pytest.fixture
def jobs(tmp_path: Path) -> list[Square]:
    return [Square(number, tmp_path / "diary") for number in (3.0, 1.0, 2.0)]


def do(folder: Path, jobs: list[Square], workers: int | None = None) -> list[Found]:
    with RunFolder(folder, {}) as opened, Runner[Found](opened, workers, False).started() as runner:
        return runner.results(jobs, "Squaring", "number")


def done(jobs: list[Square]) -> list[float]:
    return sorted(map(float, jobs[0].diary.read_text().split())) if jobs[0].diary.exists() else []


def test_results_come_in_order_and_are_made_once(jobs: list[Square], tmp_path: Path) -> None:
    first = do(tmp_path / "run", jobs[:1])
    again = do(tmp_path / "run", jobs, 2)
    assert again[:1] == first == do(tmp_path / "run", jobs[:1], 2)
    assert [found.value for found in again] == [9.0, 1.0, 4.0] and done(jobs) == [1.0, 2.0, 3.0]
    assert len(list((tmp_path / "run" / "squares").iterdir())) == 3


def test_workers_are_other_processes_of_one_thread_each(jobs: list[Square], tmp_path: Path) -> None:
    (found,) = do(tmp_path / "run", jobs[:1], 1)
    assert found.threads == 1 and found.process != os.getpid()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    (here,) = do(tmp_path / "other", jobs[:1])
    torch.set_num_threads(before)
    assert here.threads == 3 and here.process == os.getpid()


@WORKERS
def test_what_is_finished_before_a_failure_is_kept(workers: int | None, jobs: list[Square], tmp_path: Path) -> None:
    bad = replace(jobs[1], number=5.0, trouble="fails")
    lasting = [replace(jobs[1], number=7.0, trouble="lasts")] if workers else []
    do(tmp_path / "run", jobs[:1])
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"5.0 cannot be squared"):
        do(tmp_path / "run", [jobs[0], *lasting, bad], workers)
    assert time.monotonic() - started < 60  # nobody waits for the one that lasts
    assert [found.value for found in do(tmp_path / "run", jobs)] == [9.0, 1.0, 4.0]
    assert done(jobs).count(3.0) == 1


def test_a_worker_that_dies_is_told_and_what_is_finished_is_kept(jobs: list[Square], tmp_path: Path) -> None:
    do(tmp_path / "run", jobs[:1])
    with pytest.raises(LoxError, match=r"pass fewer workers\. What is finished is kept"):
        do(tmp_path / "run", [jobs[0], replace(jobs[1], trouble="dies")], 1)
    do(tmp_path / "run", jobs)
    assert done(jobs) == [1.0, 1.0, 2.0, 3.0]


def test_what_workers_warn_of_is_heard_here(jobs: list[Square], tmp_path: Path) -> None:
    loud = [replace(job, trouble="warns") for job in jobs[:2]]
    with pytest.warns(UserWarning, match="squares grow") as heard:
        do(tmp_path / "run", loud, 1)
    assert len(heard) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        do(tmp_path / "other", jobs)  # control: nothing is heard where nothing is warned of


def test_other_settings_are_refused_and_named(jobs: list[Square], tmp_path: Path) -> None:
    do(tmp_path / "run", jobs)
    before = (tmp_path / "run" / "squares" / "of-3.0.json").read_bytes()
    told = r"holds squares/of-3.0.json with other settings \(number: 3.0 there, -3.0 now\): choose another folder"
    with pytest.raises(OutputError, match=told):
        do(tmp_path / "run", [jobs[1], replace(jobs[0], number=-3.0)])
    assert (tmp_path / "run" / "squares" / "of-3.0.json").read_bytes() == before


DAMAGED = {
    "cut short": b'{"settings": {"num',
    "not text": b"\xff\xfe\x00",
    "no object": b"[1, 2]",
    "without a result": b'{"settings": {"number": 3.0, "power": 2}}',
    "result of another form": b'{"settings": {"number": 3.0, "power": 2}, "result": "nine"}',
    "settings of another form": b'{"settings": 3, "result": {"value": 9.0}}',
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_named_with_what_to_do(kind: str, jobs: list[Square], tmp_path: Path) -> None:
    do(tmp_path / "run", jobs)
    path = tmp_path / "run" / "squares" / "of-3.0.json"
    path.write_bytes(DAMAGED[kind])
    with pytest.raises(OutputError, match=rf"{path} is damaged: remove it, and the run makes it anew"):
        do(tmp_path / "run", jobs)
    path.unlink()
    assert do(tmp_path / "run", jobs)[0].value == 9.0 and done(jobs) == [1.0, 2.0, 3.0, 3.0]


def test_an_empty_file_is_none(jobs: list[Square], tmp_path: Path) -> None:
    """A file system may leave one where the machine lost its power."""
    do(tmp_path / "run", jobs)
    (tmp_path / "run" / "squares" / "of-3.0.json").write_text("")
    assert do(tmp_path / "run", jobs)[0].value == 9.0 and done(jobs) == [1.0, 2.0, 3.0, 3.0]


def test_a_job_whose_folder_is_gone_is_done_again(jobs: list[Square], tmp_path: Path) -> None:
    making = [replace(jobs[0], leaves=tmp_path / "made")]
    do(tmp_path / "run", making)
    do(tmp_path / "run", making)
    assert done(jobs) == [3.0]
    (tmp_path / "made").rmdir()
    do(tmp_path / "run", making)
    assert done(jobs) == [3.0, 3.0] and (tmp_path / "made").is_dir()


def test_a_disk_that_takes_no_file(jobs: list[Square], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    do(tmp_path / "run", jobs[:1])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OutputError, match=r"run cannot be written: No space left"):
            do(tmp_path / "run", jobs)
    assert [path.name for path in (tmp_path / "run" / "squares").iterdir()] == ["of-3.0.json"]
    assert [found.value for found in do(tmp_path / "run", jobs)] == [9.0, 1.0, 4.0]


def test_a_file_that_is_where_a_folder_belongs(jobs: list[Square], tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", {}) as folder:
        folder.write("squares", "not a folder")
        with pytest.raises(OutputError, match="cannot be written: "):
            Runner[Found](folder, None, False).results(jobs, "Squaring", "number")


def test_files_appear_complete_in_folders(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", {}) as folder:
        folder.write("deep/er/file.json", json.dumps({"a": 1}))
        folder.write("deep/er/file.json", json.dumps({"a": 2}))
        assert folder.read("deep/er/file.json") == '{"a": 2}' and folder.read("deep/other.json") == ""
    assert [path.name for path in (tmp_path / "run" / "deep" / "er").iterdir()] == ["file.json"]


def test_a_run_of_another_kind_is_not_taken_over(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", {"run": "stress test"}) as folder:
        folder.write("cells/one.json", "{}")
    with pytest.raises(OutputError, match="holds a run with other settings"), RunFolder(tmp_path / "run", {"n": 3}):
        pass
    with RunFolder(tmp_path / "begun", {"run": "stress test"}):
        pass
    with RunFolder(tmp_path / "begun", {"n": 3}) as folder:  # control: a run that got nowhere
        assert json.loads(folder.read("run.json"))["settings"] == {"n": 3}


def test_workers_do_not_hear_ctrl_c_and_end_with_the_block() -> None:
    with Workers(1) as workers:
        process = workers.submit(os.getpid).result()
        os.kill(process, signal.SIGINT)
        assert workers.submit(pow, 2, 3).result(timeout=60) == 8
        lasting = workers.submit(time.sleep, 600)
        while not lasting.running():
            time.sleep(0.01)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
