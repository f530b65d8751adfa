"""Whatever happens in the middle: the inputs are untouched, the output is absent or complete, and a rerun succeeds."""

import ctypes
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import zoo
from lox_hf import CheckpointError, LoxConfig, OutputError, SafetySubspace, extract_lox_adapter, harden_checkpoint
from lox_hf.weights import output_file as output_module
from lox_hf.weights.output_file import OutputFile
from lox_hf.weights.writer import FolderWriter
from test_bad_input import contents, nothing_lost

KILLS, MATRICES, SIDE = 10, 12, 512


def make_pair(folder: Path) -> Path:
    """A pair without an architecture: two folders of matrices in several shards, with a side file."""
    generator = torch.Generator().manual_seed(0)
    names = [f"m{number}.weight" for number in range(MATRICES)]
    base = {name: torch.randn(SIDE, SIDE, generator=generator) for name in names}
    for side in ("base", "aligned"):
        (folder / side).mkdir(parents=True)
        (folder / side / "config.json").write_text("{}")
        (folder / side / "tokenizer.json").write_text('{"side": "file"}')
        weight_map = {}
        for number, name in enumerate(names):
            low_rank = torch.randn(SIDE, 6, generator=generator) @ torch.randn(6, SIDE, generator=generator)
            change = 0.0 if side == "base" else 0.1 * low_rank
            file = f"model-{number + 1:05}-of-{MATRICES:05}.safetensors"
            save_file({name: (base[name] + change).bfloat16()}, folder / side / file)
            weight_map[name] = file
        (folder / side / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair that no test changes."""
    return make_pair(tmp_path_factory.mktemp("template"))


@pytest.fixture
def pair(template: Path, tmp_path: Path) -> Path:
    """Folder of `aligned` and `base`, a copy of the test's own."""
    return Path(shutil.copytree(template, tmp_path / "pair"))


def harden(pair: Path, output: Path, svd: str = "auto") -> None:
    harden_checkpoint(pair / "aligned", output, LoxConfig(str(pair / "base"), svd=svd))


def results(folder: Path) -> dict[str, bytes]:
    """Everything in an output but the report, which holds times, with the output's own name in it."""
    return {name: data for name, data in contents(folder).items() if name != "lox_report.json"}


@pytest.fixture(scope="module")
def run_apart() -> Iterator[Callable[[Path, Path], multiprocessing.Process]]:
    """Starts harden_checkpoint in a process of its own; torch is imported once and not in every one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lox_hf.harden"])

    def start(pair: Path, output: Path) -> multiprocessing.Process:
        config = LoxConfig(str(pair / "base"), svd="exact")
        process = context.Process(target=harden_checkpoint, args=(str(pair / "aligned"), str(output), config))
        process.start()
        return process

    yield start


def wait_for(path: Path, process: multiprocessing.Process) -> None:
    """Wait until the path exists or the process is over."""
    while not path.exists() and process.is_alive():
        time.sleep(0.001)


def test_killed_at_random_moments(
    pair: Path, tmp_path: Path, run_apart: Callable[..., multiprocessing.Process]
) -> None:
    output, partial = tmp_path / "out", tmp_path / ".out.lox-partial"
    inputs = contents(pair)
    process = run_apart(pair, output)  # the reference run: as long as all the others would take
    wait_for(partial, process)
    started = time.perf_counter()
    process.join()
    duration, expected = time.perf_counter() - started, results(output)
    assert process.exitcode == 0 and {"config.json", "tokenizer.json", "lox_config.json"} < set(expected)
    shutil.rmtree(output)

    rng, cut_short = random.Random(0), 0
    for number in range(KILLS):
        process = run_apart(pair, output)
        wait_for(partial, process)
        # Some at the very start and the end, where files are made and published.
        delay = duration * (0.01, 1.0)[number] if number < 2 else rng.uniform(0.0, duration)
        time.sleep(delay)
        process.kill()
        process.join()
        assert contents(pair) == inputs
        if output.exists():
            assert results(output) == expected
            shutil.rmtree(output)
        else:
            assert process.exitcode == -signal.SIGKILL
            cut_short += 1
    assert cut_short >= KILLS // 4  # control: the kills hit the work

    if not partial.exists():  # the last one came too late
        partial.mkdir()
        (partial / "left").write_text("over")
    harden(pair, output, "exact")
    assert results(output) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pair"]


def test_interrupted_from_the_keyboard(pair: Path, tmp_path: Path) -> None:
    inputs, partial = contents(pair), tmp_path / ".out.lox-partial"
    words = ["harden", pair / "aligned", "--base-model", pair / "base", "--output", tmp_path / "out", "--svd", "exact"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-m", "lox_hf.cli", *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # Tests that a shell runs in the background may inherit that Ctrl-C is ignored, as the command then does too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not partial.exists() and process.poll() is None:
        time.sleep(0.001)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told.strip()) == (130, "lox-hf: interrupted, nothing was published")
    assert contents(pair) == inputs
    assert [path.name for path in tmp_path.iterdir()] == ["pair"]


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("allocate", errno.ENOSPC),
        ("write", errno.EIO),
        ("write", errno.ENOSPC),
        ("flush", errno.EIO),
        ("publish", errno.EROFS),
    ],
)
def test_the_disk_fails(moment: str, number: int, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    def fail_in_c(*_: object) -> int:
        ctypes.set_errno(number)
        return -1

    reason = {errno.ENOSPC: "the disk is full", errno.EROFS: "read-only", errno.EIO: "Input/output error"}[number]
    with monkeypatch.context() as patch, nothing_lost(tmp_path):
        if moment == "allocate":
            patch.setattr(output_module, "_FALLOCATE", fail_in_c)
        else:
            patch.setattr(os, {"write": "pwrite", "flush": "fsync", "publish": "rename"}[moment], fail)
        with pytest.raises(OutputError, match=rf"Cannot write .*/out: .*{reason}.*Nothing was published"):
            harden(pair, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["pair"]
    harden(pair, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_flush_that_fails_in_the_background_is_told_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports a lost write once only: to the flush in the background, not to the one at the end."""
    monkeypatch.setattr(output_module, "FLUSH_BYTES", 4)
    answers = iter([OSError(errno.EIO, "lost"), None])

    def fsync(fd: int) -> None:
        if (answer := next(answers)) is not None:
            raise answer

    monkeypatch.setattr(os, "fsync", fsync)
    file = OutputFile(tmp_path / "file", 8, tmp_path)
    file.write(memoryview(b"12345678"), 0)
    with pytest.raises(OSError, match="lost"):
        file.close()
    assert next(answers, "both were made") == "both were made"


def test_a_file_system_that_reserves_nothing(tmp_path: Path) -> None:
    """As NFS 3: the C library would write every block, and cannot do it twice."""
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "ramfs", "none", str(tmp_path)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("a disk in memory cannot be mounted here")
    try:
        for data in (b"once", b"more"):
            file = OutputFile(tmp_path / "file", 2**20, tmp_path)
            file.write(memoryview(data), 0)
            file.close()
        assert (tmp_path / "file").read_bytes() == b"more" + bytes(2**20 - 4)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that holds the output once, but not twice."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_shows_before_the_work(pair: Path, small_disk: Path) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(bytes(4 * 2**20))
    with nothing_lost(pair), pytest.raises(OutputError, match=r"too full for .*: 0.01 GB are needed, 0.00 GB free"):
        harden(pair, small_disk / "out")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    filler.unlink()
    harden(pair, small_disk / "out")
    assert len(list((small_disk / "out").iterdir())) == MATRICES + 5


def test_a_disk_that_fills_up_during_the_work(pair: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small_disk / "filler").write_bytes(bytes(4 * 2**20))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**40))
    with nothing_lost(pair), pytest.raises(OutputError, match="the disk is full"):
        harden(pair, small_disk / "out")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_what_a_killed_run_left_does_not_count_as_full(pair: Path, small_disk: Path) -> None:
    partial = small_disk / ".out.lox-partial"
    partial.mkdir()
    (partial / "model-00001-of-00012.safetensors").write_bytes(bytes(6 * 2**20))
    (partial / "folder").mkdir()
    assert shutil.disk_usage(small_disk).free < 6 * 2**20  # control: without it, it would not fit
    harden(pair, small_disk / "out")
    assert [path.name for path in small_disk.iterdir()] == ["out"]


def test_a_read_only_target(pair: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with nothing_lost(pair), pytest.raises(OutputError, match=r"cannot be written: no write permission in .*disk"):
        harden(pair, small_disk / "out")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    harden(pair, small_disk / "out")


def test_a_target_without_permission(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told what the system says, as the superuser may write anywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with nothing_lost(tmp_path), pytest.raises(OutputError, match="no write permission"):
        harden(pair, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


OUTPUTS = {
    "aligned": "is an input or lies inside one",
    "base": "is an input or lies inside one",
    "aligned/out": "is an input or lies inside one",
    "base/deep/out": "is an input or lies inside one",
    "link to aligned": "is an input or lies inside one",
    "link to base/out": "is an input or lies inside one",
    "full folder": "exists: choose another",
    "file": "exists: choose another",
    "link to nothing": "exists: choose another",
    "link to empty": "exists: choose another",
    "file/out": "cannot be written",
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_are_refused(name: str, pair: Path) -> None:
    for target in ("aligned", "base", "nothing", "empty"):
        (pair / f"link to {target}").symlink_to(pair / target)
    (pair / "full folder").mkdir()
    (pair / "full folder" / "thesis.txt").write_text("precious")
    (pair / "file").write_text("precious")
    (pair / "empty").mkdir()
    with nothing_lost(pair), pytest.raises(OutputError, match=OUTPUTS[name]):
        harden(pair, pair / name)
    with nothing_lost(pair), pytest.raises(OutputError, match=f"{OUTPUTS[name]}|exists"):
        extract_lox_adapter(pair / "aligned", pair / name, LoxConfig(str(pair / "base")))
    harden(pair, pair / "empty")  # controls: an empty folder, and parents that do not exist yet
    harden(pair, pair / "new" / "deep" / "out")
    assert (pair / "new" / "deep" / "out" / "config.json").is_file()


def test_a_subspace_is_not_written_over_anything(pair: Path, tmp_path: Path) -> None:
    subspace = SafetySubspace.from_models(pair / "aligned", pair / "base", LoxConfig(r=1))
    with nothing_lost(tmp_path), pytest.raises(OutputError, match="exists"):
        subspace.save_pretrained(pair)
    assert subspace.save_pretrained(tmp_path / "subspace").is_dir()


def test_a_second_run_does_not_disturb_the_first(pair: Path, tmp_path: Path) -> None:
    with FolderWriter(tmp_path / "out") as first:
        first.write("file", b"of the first run")
        before = contents(tmp_path)
        with pytest.raises(OutputError, match=r"Another run is writing .*/out"):
            harden(pair, tmp_path / "out")
        assert contents(tmp_path) == before
        harden(pair, tmp_path / "other")  # control: another output may be written
        first.publish()
    assert contents(tmp_path / "out") == {"file": b"of the first run"}


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="Nothing was published"), FolderWriter(tmp_path / "out") as late:
        late.write("file", b"late")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_bytes(b"first")
        late.publish()
    assert contents(tmp_path) == {"out/file": b"first"}


MODELLING = """
from pathlib import Path
from types import SimpleNamespace
import torch
from transformers import PreTrainedConfig, PreTrainedModel
Path({marker!r}).write_text("this code ran")

class OddConfig(PreTrainedConfig):
    model_type = "odd"

class OddModel(PreTrainedModel):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(16, 16, bias=False)
        self.post_init()
"""


def test_no_code_of_the_checkpoint_is_run_unless_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    marker = tmp_path / "marker"
    auto = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddModel"}
    config = {"model_type": "odd", "architectures": ["OddModel"], "auto_map": auto}
    for number, side in enumerate(("aligned", "base")):
        folder = tmp_path / "pair" / side
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "modeling_odd.py").write_text(MODELLING.format(marker=str(marker)))
        save_file({"layer.weight": torch.eye(16) * number}, folder / "model.safetensors")
    pair, aligned = tmp_path / "pair", tmp_path / "pair" / "aligned"
    harden(pair, tmp_path / "out")  # every tensor: the files say enough
    settings = LoxConfig(str(pair / "base"), r=2, target_modules="all-linear")
    with nothing_lost(pair), pytest.raises(CheckpointError, match="trust_remote_code=True"):
        harden_checkpoint(aligned, tmp_path / "linear", settings)
    with nothing_lost(pair), pytest.raises(CheckpointError, match="trust_remote_code=True"):
        extract_lox_adapter(aligned, tmp_path / "linear", LoxConfig(str(pair / "base"), r=2))
    assert not marker.exists()
    harden_checkpoint(aligned, tmp_path / "linear", settings, trust_remote_code=True)
    assert marker.read_text() == "this code ran"
    assert (tmp_path / "linear" / "modeling_odd.py").read_bytes() == (aligned / "modeling_odd.py").read_bytes()
    assert zoo.read_checkpoint(tmp_path / "linear").keys() == {"layer.weight"}
