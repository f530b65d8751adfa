"""Batch sizes: from the free memory of machine and containers, as a fake tree of files shows it, and halved."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from small_models import make_model

from lox_hf.errors import LoxError
from lox_hf.evaluation.models import free_memory
from lox_hf.evaluation.models.batch_size import fitting_batch_size, is_out_of_memory, run_in_batches

CPU = torch.device("cpu")
MIB = 1 << 20
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, object], None]:
    """Write a file of the fake tree, which begins as a machine with 1000 MiB free."""

    def write(path: str, text: object) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    monkeypatch.setattr(free_memory, "_ROOT", tmp_path)
    write("proc/meminfo", "MemTotal:       9999999 kB\nMemAvailable:   1024000 kB\nHugePages_Total:       0")
    return write


def write_group(write: Callable[[str, object], None], folder: str, limit: object, used: int, cache: int) -> None:
    """A control group of either version, in MiB."""
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    if not folder.startswith(V1):
        names = ("memory.max", "memory.current", "inactive_file")
    write(f"{folder}/{names[0]}", limit * MIB if isinstance(limit, int) else limit)
    write(f"{folder}/{names[1]}", used * MIB)
    write(f"{folder}/memory.stat", f"anon 5\n{names[2]} {cache * MIB}\nactive_file {7 * MIB}")


def free_mib() -> float:
    return free_memory.free_bytes(CPU) / MIB


def test_the_machine_without_limits(write: Callable[[str, object], None], tmp_path: Path) -> None:
    assert free_mib() == 1000
    write("proc/self/cgroup", "0::/")
    write_group(write, V2, "max", 900, 0)
    assert free_mib() == 1000
    (tmp_path / "proc/meminfo").unlink()
    assert free_mib() == 4096


def test_a_containers_file_cache_is_free(write: Callable[[str, object], None]) -> None:
    write("proc/self/cgroup", "0::/")
    write_group(write, V2, 500, 450, 0)
    assert free_mib() == 50
    write_group(write, V2, 500, 450, 300)
    assert free_mib() == 350
    write_group(write, V2, 500, 600, 0)
    assert free_mib() == 0


@pytest.mark.parametrize(("inner", "outer", "expected"), [("max", 300, 200), (250, "max", 150), (250, 300, 150)])
def test_groups_inside_groups(
    write: Callable[[str, object], None], inner: object, outer: object, expected: int
) -> None:
    write("proc/self/cgroup", "0::/user.slice/job.scope")
    write_group(write, f"{V2}/user.slice/job.scope", inner, 100, 0)
    write_group(write, f"{V2}/user.slice", outer, 100, 0)
    assert free_mib() == expected


def test_groups_of_version_1(write: Callable[[str, object], None]) -> None:
    write("proc/self/cgroup", "5:devices:/\n4:memory:/docker/0123\n0::/")
    write_group(write, V1, 400, 350, 100)  # in the container its own group is the top, and the path is not there
    assert free_mib() == 150
    write_group(write, f"{V1}/docker/0123", 9223372036854771712 // MIB, 0, 0)
    assert free_mib() == 150


def test_the_batch_size_follows_the_free_memory(write: Callable[[str, object], None]) -> None:
    model, sizes = make_model(), []
    for free_kib in (1 << 24, 64_000, 63_000, 1500, 1):
        write("proc/meminfo", f"MemAvailable: {free_kib} kB")
        sizes.append(fitting_batch_size(model, 20))
    assert (sizes[0], sizes[-1]) == (128, 1)
    assert sizes[1] == sizes[2]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) >= 3


def at_most(rows: int, error: BaseException) -> Callable[[Sequence[int]], Sequence[int]]:
    """A function that has memory for so many items."""

    def function(batch: Sequence[int]) -> Sequence[int]:
        if len(batch) > rows:
            raise error
        return batch

    return function


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_batches_are_halved_whatever_memory_runs_out(error: Exception) -> None:
    assert is_out_of_memory(error)
    found = list(run_in_batches(at_most(3, error), range(11), 8, device=CPU, one="one number."))
    assert [list(batch) for _, batch, _ in found] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]
    assert {size for size, _, _ in found} == {2}
    with pytest.raises(LoxError, match=r"^The memory of cpu does not suffice for one number\.$"):
        list(run_in_batches(at_most(0, error), range(11), 8, device=CPU, one="one number."))


def test_other_errors_stay() -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert not is_out_of_memory(error)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        list(run_in_batches(at_most(3, error), range(11), 8, device=CPU, one="one number."))
