"""Measure child processes: CPU-seconds, wall time, peak memory; and put the page cache into a known state.

Standard library only, so that the measuring process stays small and costs the measured ones nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SAMPLE_PERIOD_S = 0.005
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class ChildError(RuntimeError):
    """A measured process failed; the message ends with what it wrote to stderr."""


@dataclass(frozen=True)
class Child:
    """What one finished child process cost; memory is zero where it was not sampled."""

    cpu_s: float
    wall_s: float
    peak_anonymous_bytes: int
    peak_rss_bytes: int
    samples: tuple[tuple[float, dict[int, int]], ...]
    result: dict[str, Any]

    def peak_between(self, start_s: float, end_s: float, pid: int | None = None) -> int:
        """Return the highest anonymous memory sampled between two readings of `time.monotonic`: of all, or of one."""
        inside = [sizes for at_s, sizes in self.samples if start_s <= at_s <= end_s]
        return max((sum(sizes.values()) if pid is None else sizes.get(pid, 0) for sizes in inside), default=0)


def anonymous_bytes(pid: int | str = "self") -> int:
    """Return the anonymous resident memory of one process (RssAnon), 0 once it is gone."""
    return _status_bytes(pid)[0]


def run_child(command: Sequence[str], threads: int, sample: bool = False) -> Child:
    """Run a command to its end and return what it cost.

    CPU-seconds are user plus system time of the process and of every descendant it waited for, from `os.wait4`. A
    child hands back values by printing a JSON object as its last line.

    Raises:
        ChildError: The command ended with another exit code than 0.
    """
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=_environment(threads))
        samples, peak_rss = _sample_until_exit(process.pid) if sample else ((), 0)
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            tail = _text(stderr)[-3000:]
            raise ChildError(f"{' '.join(command)}\nended with exit code {process.returncode}:\n{tail}")
        return Child(
            cpu_s=usage.ru_utime + usage.ru_stime,
            wall_s=wall_s,
            peak_anonymous_bytes=max((sum(sizes.values()) for _, sizes in samples), default=0),
            peak_rss_bytes=peak_rss,
            samples=samples,
            result=_last_json(_text(stdout)),
        )


def run_job(
    script: str, job: str, arguments: dict[str, Any], threads: int, sample: bool = False, processes: int = 1
) -> Child:
    """Run one job of a script of this folder in a fresh Python process, or in several that torchrun starts."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launcher = [sys.executable, *(torchrun if processes > 1 else [])]
    return run_child([*launcher, str(HERE / script), job, json.dumps(arguments)], threads, sample)


def serve_job(jobs: dict[str, Any]) -> None:
    """Be the child: run the job named on the command line and print its result as the last line.

    Of several children that torchrun has started, the first speaks.
    """
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    result = jobs[name](**arguments)
    if os.environ.get("RANK", "0") == "0":
        print(f"\n{json.dumps(result)}", flush=True)


def clear_output(folder: Path) -> None:
    """Delete an output folder and wait until the disk is idle, so that no run pays for the one before it."""
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()


def warm(folders: Sequence[Path]) -> None:
    """Read every file once, so that it lies in the page cache."""
    for file in _files(folders):
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 22):
                pass


def evict(folders: Sequence[Path]) -> str:
    """Drop the files from the page cache and return how: all caches where permitted, else these files only."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="ascii")
    except OSError:
        for file in _files(folders):
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return "posix_fadvise(DONTNEED) on the checkpoint files"
    return "/proc/sys/vm/drop_caches"


def machine() -> dict[str, Any]:
    """Describe this machine and the versions that ran, for the record."""
    from importlib.metadata import version

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0].partition(": ")[2] if names else "unknown",
        "cpu_count": len(os.sched_getaffinity(0)),
        "kernel": os.uname().release,
        "python": sys.version.split()[0],
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors", "peft")},
    }


def _environment(threads: int) -> dict[str, str]:
    """Return the child's environment: a fixed number of threads, this checkout first, nothing fetched."""
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **fixed, **dict.fromkeys(_THREAD_VARIABLES, str(threads))}


def _sample_until_exit(pid: int) -> tuple[tuple[tuple[float, dict[int, int]], ...], int]:
    """Sample anonymous memory of a process and its descendants, each; also return the sum of their RSS peaks."""
    samples: list[tuple[float, dict[int, int]]] = []
    peaks: dict[int, int] = {}
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        anonymous: dict[int, int] = {}
        for member in _tree(pid):
            anonymous[member], peaks[member] = _status_bytes(member, peaks.get(member, 0))
        samples.append((time.monotonic(), anonymous))
        time.sleep(SAMPLE_PERIOD_S)
    return tuple(samples), sum(peaks.values())


def _tree(pid: int) -> list[int]:
    """Return a process and all its living descendants."""
    members = [pid]
    for member in members:
        for children in Path(f"/proc/{member}/task").glob("*/children"):
            try:
                members += map(int, children.read_text().split())
            except OSError:
                continue
    return members


def _status_bytes(pid: int | str, peak_rss: int = 0) -> tuple[int, int]:
    """Return (RssAnon, VmHWM) of a process; the counters cost no page walk, unlike smaps_rollup."""
    anonymous = 0
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return anonymous, peak_rss
    for line in lines:
        if line.startswith("RssAnon:"):
            anonymous = int(line.split()[1]) * 1024
        elif line.startswith("VmHWM:"):
            peak_rss = int(line.split()[1]) * 1024
    return anonymous, peak_rss


def _files(folders: Sequence[Path]) -> list[Path]:
    return [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]


def _text(stream: Any) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace")


def _last_json(text: str) -> dict[str, Any]:
    """Parse the last line as a JSON object; a command of somebody else's prints none."""
    last = text.rstrip().rpartition("\n")[2]
    try:
        value = json.loads(last)
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}
