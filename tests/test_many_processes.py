"""Several processes that share one checkpoint: the same bytes as from one, and one clear end whatever happens."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lox_hf import HardeningReport, LoxConfig, OutputError, harden_checkpoint
from lox_hf.inputs import open_pair
from lox_hf.parallel.ranks import join_ranks
from lox_hf.parallel.share import PART_BYTES, cut, part_numbers
from lox_hf.records import REPORT_NAME
from lox_hf.weight_files import make_files, source_of
from lox_hf.weights.journal import JOURNAL
from lox_hf.weights.parts_writer import PartsWriter
from ranks_worker import LOST_AFTER_S
from test_faults import MATRICES, contents, make_pair, results

WORKER = Path(__file__).with_name("ranks_worker.py")
START_S = 30  # to import torch on a busy machine


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """Folder of `aligned` and `base`."""
    return make_pair(tmp_path / "pair")


@given(st.lists(st.integers(0, 1000), max_size=60), st.integers(1, 9))
def test_runs_are_neighbours_and_weigh_about_the_same(costs: list[int], count: int) -> None:
    runs = cut(range(len(costs)), costs, count)
    assert [item for run in runs for item in run] == list(range(len(costs)))
    assert len(runs) == count
    fair = sum(costs) / count
    assert all(abs(sum(costs[item] for item in run) - fair) <= max(costs) for run in runs if costs)


def test_a_part_lies_in_one_file_and_ends_when_it_is_large() -> None:
    names, half = list("abcdef"), PART_BYTES // 2
    files = dict(zip(names, ["x", "x", "x", "y", "y", "x"], strict=True))
    assert list(part_numbers(names, files.__getitem__, lambda _: half).values()) == [0, 0, 1, 2, 2, 3]


def test_alone_without_a_launcher() -> None:
    with join_ranks() as ranks:
        assert (ranks.rank, ranks.size, ranks.gather([1]), ranks.check()) == (0, 1, [[1]], None)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(scene: str, pair: Path, output: Path, count: int = 2) -> list[subprocess.Popen[str]]:
    """Start processes without an agent above them, which would stop the others when one ends."""
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    common = {"WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1", **place}
    paths = {"PYTHONPATH": str(WORKER.parents[1])}
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), scene, str(pair), str(output)],
            env={**os.environ, **common, **paths, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


@pytest.fixture
def launched() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are not left behind."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def told(process: subprocess.Popen[str], seconds: float = START_S + 3 * LOST_AFTER_S) -> str:
    """What a process said on standard error by its end; warnings of libraries are left out."""
    lines = process.communicate(timeout=seconds)[1].splitlines()
    return "\n".join(line for line in lines if "Error: " in line or "stays in" in line)


def test_the_same_bytes_as_from_one_process(pair: Path, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    report = harden_checkpoint(pair / "aligned", alone, LoxConfig(str(pair / "base")))
    processes = start("plain", pair, together, count=3)
    said = [process.communicate(timeout=START_S + 30) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert sorted(out.strip() for out, _ in said) == [f"{rank} {MATRICES}" for rank in range(3)]
    assert results(together) == results(alone)
    assert len(report.tensors) == MATRICES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "pair", "together"]


def torchrun(*words: object) -> subprocess.CompletedProcess[str]:
    """Run the command in two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*launcher, "-m", "lox_hf.cli", "harden", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=START_S + 60,
    )


def test_the_command_under_torchrun(pair: Path, tmp_path: Path) -> None:
    harden_checkpoint(pair / "aligned", tmp_path / "alone", LoxConfig(str(pair / "base")))
    done = torchrun(pair / "aligned", "--base-model", pair / "base", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("matrices hardened") == 1  # one process speaks
    assert results(tmp_path / "out") == results(tmp_path / "alone")

    refused = torchrun(pair / "aligned", "--base-model", pair / "missing", "--output", tmp_path / "other")
    assert refused.returncode != 0
    errors = [line for line in refused.stderr.splitlines() if line.startswith("lox-hf: error: ")]
    assert len(errors) == 2
    assert all(f"{pair / 'missing'}" in line for line in errors)

    planned = torchrun(pair / "aligned", "--base-model", pair / "base", "--dry-run", "--json")
    assert json.loads(planned.stdout)["estimate"]["processes"] == 2


@pytest.mark.parametrize(
    ("scene", "first", "second"),
    [
        ("other settings", "process 1: config.r: 6 in process 0, 2 here; config.alpha: 1.25", "config.r: 6 in"),
        ("other files", "process 1: .*base.*changed", "process 1: .*base"),
        ("no files", "Process 1 of 2 failed: .*missing", "missing"),
        ("elsewhere", "process 1: output: '.*/out' in process 0, '.*/pair/out' here", "process 1: output"),
        ("full disk", "Process 1 of 2 failed: Cannot write .*out.*was published", "Cannot write .*File too large"),
    ],
)
def test_what_keeps_one_from_working_is_told_by_all(
    scene: str,
    first: str,
    second: str,
    pair: Path,
    tmp_path: Path,
    launched: list[subprocess.Popen[str]],
) -> None:
    if scene == "other files":
        shutil.copytree(pair / "base", pair / "other")
        shutil.copy(pair / "aligned" / "model-00003-of-00012.safetensors", pair / "other")
    before = contents(pair)
    launched += start(scene, pair, tmp_path / "out")
    assert_matches(first, told(launched[0]))
    assert_matches(second, told(launched[1]))
    assert [process.returncode for process in launched] == [2, 2]
    assert not (tmp_path / "out").exists()
    assert contents(pair) == before
    if scene != "full disk":  # nothing was begun
        assert [path.name for path in tmp_path.iterdir()] == ["pair"]


def assert_matches(pattern: str, text: str) -> None:
    """A message says this."""
    with pytest.raises(AssertionError, match=f"(?s){pattern}"):
        raise AssertionError(text)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_others_and_a_rerun_goes_on(
    lost: int,
    pair: Path,
    tmp_path: Path,
    launched: list[subprocess.Popen[str]],
) -> None:
    output, partial = tmp_path / "out", tmp_path / ".out.lox-partial"
    launched += start("slow", pair, output)
    kill_midway(launched, lost, partial)
    assert_matches(
        "Process 1 of 2 has shown nothing for 4 s" if lost == 1 else "The connection to the other processes was lost",
        told(launched[1 - lost]),
    )
    assert launched[1 - lost].returncode == 2
    assert not output.exists()
    times = seconds(partial)
    again = start("slow", pair, output, count=3)
    launched += again
    said = [process.communicate(timeout=START_S + 60) for process in again]
    assert [process.returncode for process in again] == [0, 0, 0], said
    check_not_made_again(output, times)
    harden_checkpoint(pair / "aligned", tmp_path / "alone", LoxConfig(str(pair / "base"), svd="exact"))
    assert results(output) == results(tmp_path / "alone")
    assert not partial.exists()


def kill_midway(processes: list[subprocess.Popen[str]], number: int, partial: Path) -> dict[str, float]:
    """Kill one process when two parts are finished; return what they took."""
    while len(finished(partial)) < 2 and all(process.poll() is None for process in processes):
        time.sleep(0.005)
    processes[number].kill()
    processes[number].wait()
    return seconds(partial)


def finished(partial: Path) -> list[Path]:
    """Entries of the journal."""
    return sorted(path for path in (partial / JOURNAL).glob("[!.]*.json") if path.name != "run.json")


def seconds(partial: Path) -> dict[str, float]:
    """How long each finished matrix took: no two runs take the same time."""
    entries = [json.loads(path.read_text()) for path in finished(partial)]
    return {name: item["seconds"] for entry in entries for name, (item,) in entry.items()}


def check_not_made_again(output: Path, times: dict[str, float]) -> None:
    """The report holds what the killed run measured."""
    report = HardeningReport.from_json((output / REPORT_NAME).read_text())
    assert {item.name: item.seconds for item in report.tensors if item.name in times} == times
    assert len(report.tensors) == MATRICES > len(times) >= 2


def test_a_lost_machine_is_told_on_the_others(
    pair: Path, tmp_path: Path, launched: list[subprocess.Popen[str]]
) -> None:
    """Two launchers as on two machines; all that runs on the second ends at once."""
    meeting = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{free_port()}"]
    logs = [tmp_path / f"{node}.log" for node in range(2)]
    for node, log in enumerate(logs):
        words = [*meeting, f"--rdzv_conf=is_host={int(node == 0)}", str(WORKER), "slow", str(pair)]
        launched.append(
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *words, str(tmp_path / "out")],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[1])},
                stderr=log.open("w"),
                text=True,
            )
        )
    while len(finished(tmp_path / ".out.lox-partial")) < 2 and all(process.poll() is None for process in launched):
        time.sleep(0.005)
    workers = [children(process.pid) for process in launched]
    for lost in [launched[1].pid, *workers[1]]:
        os.kill(lost, signal.SIGKILL)
    deadline = time.monotonic() + START_S + 3 * LOST_AFTER_S
    while "DistributedError" not in logs[0].read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert_matches("Process [01] of 2 has shown nothing for 4 s|connection to the other", logs[0].read_text())
    assert not (tmp_path / "out").exists()
    for left in workers[0]:  # the launcher itself waits for the other one for minutes
        with suppress(ProcessLookupError):
            os.kill(left, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    lists = [(task / "children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return [int(child) for text in lists for child in text.split()]


def test_a_process_that_stands_still_is_told(
    pair: Path,
    tmp_path: Path,
    launched: list[subprocess.Popen[str]],
) -> None:
    launched += start("frozen", pair, tmp_path / "out")
    assert_matches("Process 1 of 2 has shown nothing for 4 s", told(launched[0]))
    launched[1].send_signal(signal.SIGCONT)
    assert_matches("Process 1 of 2 has shown nothing|connection to the other processes was lost", told(launched[1]))
    assert [path.name for path in tmp_path.iterdir()] == ["pair"]


def test_a_frozen_first_process_holds_nobody_up(
    pair: Path, tmp_path: Path, launched: list[subprocess.Popen[str]]
) -> None:
    """It holds the store that all talk through, and nothing on the line says that it is gone."""
    launched += start("first frozen", pair, tmp_path / "out")
    assert_matches("The connection to the other processes was lost .*no answer for 4 s", told(launched[1]))
    launched[0].send_signal(signal.SIGCONT)
    assert_matches("Process 1 of 2 (has shown nothing|failed)|connection to the other", told(launched[0]))
    assert [path.name for path in tmp_path.iterdir()] == ["pair"]


def test_a_stop_does_not_cut_publishing_short(
    pair: Path, tmp_path: Path, launched: list[subprocess.Popen[str]]
) -> None:
    launched += start("stopped while publishing", pair, tmp_path / "out")
    said = [process.communicate(timeout=START_S + 30) for process in launched]
    assert [process.returncode for process in launched] == [0, 0], said
    harden_checkpoint(pair / "aligned", tmp_path / "alone", LoxConfig(str(pair / "base")))
    assert results(tmp_path / "out") == results(tmp_path / "alone")


def test_parts_of_files_that_are_gone_do_not_count(pair: Path, tmp_path: Path) -> None:
    """A shard that was removed comes back with nothing in it; so may a second run that is killed at once."""
    config, run = LoxConfig(str(pair / "base")), {"run": 1}
    opened = open_pair(pair / "aligned", None, config)
    source = source_of(opened)
    name = next(iter(source.infos()))
    shard = source.shard_of(name)

    def killed_after(step: Callable[[PartsWriter], None]) -> list[str]:
        writer = PartsWriter(tmp_path / "out", run)
        writer.__enter__()
        step(writer)
        os.close(writer._lock_fd)
        return writer.journal.entries()

    def finish_one(writer: PartsWriter) -> None:
        assert make_files(source, writer) == {}
        writer.finish({name: []})

    def take_up(writer: PartsWriter) -> None:
        made.update(make_files(source, writer))

    made: dict[str, object] = {}
    assert len(killed_after(finish_one)) == 1
    assert len(killed_after(take_up)) == 1
    assert set(made) == {name}  # control: it is gone on with
    (tmp_path / ".out.lox-partial" / shard.name).unlink()
    for _ in range(2):
        made.clear()
        assert killed_after(take_up) == []
        assert made == {}


def test_a_process_that_never_comes_is_told(
    pair: Path,
    tmp_path: Path,
    launched: list[subprocess.Popen[str]],
) -> None:
    launched += start("absent", pair, tmp_path / "out")
    assert_matches("The processes could not meet", told(launched[0]))
    assert launched[1].poll() is None  # control: it was there, and did not come
    assert [path.name for path in tmp_path.iterdir()] == ["pair"]


def test_a_kill_of_one_process_alone_goes_on_too(
    pair: Path,
    tmp_path: Path,
    launched: list[subprocess.Popen[str]],
) -> None:
    output, partial = tmp_path / "out", tmp_path / ".out.lox-partial"
    launched += start("slow", pair, output, count=1)
    times = kill_midway(launched, 0, partial)

    with pytest.raises(OutputError, match="is an input"):  # a refusal touches nothing
        harden_checkpoint(pair / "aligned", pair / "aligned" / "out", LoxConfig(str(pair / "base")))
    assert seconds(partial) == times
    with pytest.warns(UserWarning, match=rf"Going on in .*: {len(times)} of {MATRICES} tensors were finished"):
        harden_checkpoint(pair / "aligned", output, LoxConfig(str(pair / "base"), svd="exact"))
    check_not_made_again(output, times)
    assert not partial.exists()


def test_other_settings_or_weights_do_not_drop_what_is_finished(
    pair: Path,
    tmp_path: Path,
    launched: list[subprocess.Popen[str]],
) -> None:
    output, partial = tmp_path / "out", tmp_path / ".out.lox-partial"
    launched += start("slow", pair, output, count=1)
    times = kill_midway(launched, 0, partial)
    tensors = load_file(pair / "aligned" / "model-00001-of-00012.safetensors")
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(changed, pair / "aligned" / "model-00001-of-00012.safetensors")
    settings = LoxConfig(str(pair / "base"), r=2)
    with pytest.raises(OutputError, match=r"finished parts of a run that was killed.*r: 6 there, 2 now"):
        harden_checkpoint(pair / "aligned", output, settings)
    assert seconds(partial) == times
    with pytest.raises(OutputError, match=r"finished parts of a run that was killed.*times"):
        harden_checkpoint(pair / "aligned", output, LoxConfig(str(pair / "base"), svd="exact"))
    shutil.rmtree(partial)
    report = harden_checkpoint(pair / "aligned", output, settings)
    assert not {item.seconds for item in report.tensors} & set(times.values())
