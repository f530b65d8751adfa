"""The weights of a hardened checkpoint: written in parts, by one process or several, and gone on with after a kill."""

import os
import socket
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from lox_hf.edit.model import edit_tensors
from lox_hf.edit.scaled import storing
from lox_hf.edit.tensor import BaseFactors, MatrixSink
from lox_hf.errors import CheckpointError, DistributedError, OutputError, listing
from lox_hf.estimate import cost
from lox_hf.inputs import Pair
from lox_hf.parallel.ranks import Ranks
from lox_hf.parallel.share import cut, part_numbers
from lox_hf.records import TensorPlan, TensorReport
from lox_hf.run_folder import differences
from lox_hf.version import versions
from lox_hf.weights.identity import file_times, weights_identity
from lox_hf.weights.output_file import COPY_BYTES, OutputFile
from lox_hf.weights.parts_writer import PartsWriter
from lox_hf.weights.selection import matrix_shape
from lox_hf.weights.shard import ShardLike
from lox_hf.weights.source import ShardedSource

NOT_ON_FILES = "harden_checkpoint works on files; for a model in memory use apply_lox."
SEEN_AFTER_S = 30.0
"""How long a process waits to see what another one has made."""
Reports = dict[str, list[TensorReport]]


def run_identity(pair: Pair, output: str, device: torch.device) -> dict[str, object]:
    """What has to be equal for processes to share a run, and for a later run to go on with it.

    Args:
        pair: Both models.
        output: Folder to publish.
        device: Where the directions are found.

    Returns:
        JSON values: settings, versions, and a hash of each side.
    """
    return {
        "config": pair.config.to_dict(),
        "aligned": weights_identity(pair.aligned.source),
        "base": pair.factors.identity(),
        "output": output,
        "device": device.type,
        "versions": versions(),
    }


def times_of(pair: Pair) -> list[dict[str, list[int]]]:
    """When the files of both sides were changed last: a run does not go on with parts that were made from others.

    Args:
        pair: Both models.

    Returns:
        Size and time by file name, of each side.
    """
    sides = [pair.aligned.source, *([pair.factors.base] if isinstance(pair.factors, BaseFactors) else [])]
    return [file_times(side) for side in sides]


def check_agreement(ranks: Ranks, run: Mapping[str, object]) -> None:
    """Refuse processes that were started with other settings or see other files.

    Args:
        ranks: The processes.
        run: What this process works on.

    Raises:
        DistributedError: If two of them differ, on every process; all differences are listed.
    """
    first, *others = ranks.gather(run)
    problems = [
        f"process {rank}: {words}"
        for rank, other in enumerate(others, start=1)
        if (words := differences(first, other, ("in process 0", "here")))
    ]
    if problems:
        raise DistributedError(
            f"The {ranks.size} processes do not work on the same run: {listing(problems, 8)} Nothing was written. "
            "Give all of them the same command and the same files."
        )


def write_weights(
    pair: Pair,
    writer: PartsWriter,
    ranks: Ranks,
    *,
    device: torch.device,
    num_workers: int | None,
    progressbar: bool | None,
) -> tuple[TensorReport, ...]:
    """Harden every tensor into the unpublished folder: each process its share, less what an earlier run has finished.

    Args:
        pair: Both models.
        writer: The folder.
        ranks: The processes that share the work.
        device: Where the work is done.
        num_workers: Threads of each process; None takes torch's number of threads.
        progressbar: Show a progress bar for this process's share; None shows process 0's on a terminal only.

    Returns:
        One report per matrix, in the order of the plans; on process 0 only, once all processes are done.

    Raises:
        NumericsError: If a matrix is not finite, does not converge or overflows; it is named.
        OutputError: If the disk is full, or the processes do not see one folder.
        DistributedError: If another process has failed or was lost.
    """
    source, journal = source_of(pair), writer.journal
    finished: Reports = make_files(source, writer) if ranks.is_first else {}
    token, names = ranks.from_first([journal.token, list(finished)])
    if not wait_until(lambda: journal.join(token), writer.output):
        raise OutputError(
            f"Process {ranks.rank} on {socket.gethostname()} does not see {writer.partial}: choose an output on a "
            "file system that all processes share."
        )
    done = set(names)
    if done and ranks.is_first:
        warnings.warn(
            f"Going on in {writer.partial}: {len(done)} of {len(pair.plans)} tensors were finished by a run before.",
            stacklevel=4,
        )
    rest = [plan for plan in pair.plans if plan.name not in done]
    mine = cut(rest, [cost(plan, pair.config.svd) for plan in rest], ranks.size)[ranks.rank]
    parts = _Parts(mine, source, writer, ranks)
    edit_tensors(
        mine,
        source,
        pair.factors,
        storing(_Folder(source, writer, {plan.name for plan in mine}), source),
        device=device,
        num_workers=num_workers,
        progressbar=progressbar if ranks.is_first else False,
        groups=parts.numbers,
        finished=parts.done,
    )
    entries = [entry for entries in ranks.gather(parts.entries) for entry in entries]
    if not ranks.is_first:
        return ()
    for entry in entries:
        finished |= journal.read(entry)
    return tuple(report for plan in pair.plans for report in finished[plan.name])


def source_of(pair: Pair) -> ShardedSource:
    """The aligned model's files.

    Args:
        pair: Both models.

    Returns:
        Its tensors in shards.

    Raises:
        CheckpointError: If it is a model in memory.
    """
    if not isinstance(pair.aligned.source, ShardedSource):
        raise CheckpointError(NOT_ON_FILES)
    return pair.aligned.source


def row_sink(tensor: Tensor, start: int, write: Callable[[memoryview, int], object]) -> MatrixSink:
    """Make a sink that writes the rows of a tensor into a file.

    Args:
        tensor: The tensor, for shape and dtype.
        start: Where it begins in the file.
        write: Takes bytes and their position in the file.

    Returns:
        The sink.
    """
    _, rows, columns = matrix_shape(tuple(tensor.shape))
    row_bytes = columns * tensor.element_size()

    def sink(number: int, part: slice, tile: Tensor) -> None:
        write(_as_bytes(tile), start + (number * rows + part.start) * row_bytes)

    return sink


def _as_bytes(rows: Tensor) -> memoryview:
    """Bytes of a CPU tensor of any dtype, without a copy where it is contiguous."""
    return rows.contiguous().view(-1).view(torch.uint8).numpy().data


def wait_until(is_seen: Callable[[], bool], output: Path) -> bool:
    """Wait for what another process has made: network file systems show it later, and may be asked to look again.

    Args:
        is_seen: Whether it is there.
        output: Folder beside which, or in whose place, it is made.

    Returns:
        False where it does not come.
    """
    deadline = time.monotonic() + SEEN_AFTER_S
    while not is_seen() and time.monotonic() < deadline:
        time.sleep(0.1)
        with suppress(OSError):
            os.listdir(output.parent)
    return is_seen()


def make_files(source: ShardedSource, writer: PartsWriter) -> Reports:
    """Make all files with their headers, and find what an earlier run has finished in them.

    Args:
        source: The aligned model's files.
        writer: The folder.

    Returns:
        Reports of the finished tensors by their names.
    """
    journal = writer.journal
    if not all(_is_whole(writer, shard) for shard in source.shards):
        journal.begin(anew=True)  # before there are files of the right size with nothing in them
    for shard in source.shards:
        file = writer.create(shard.name, shard.size_bytes)
        file.write(shard.header, 0)
        writer.close(file)
    found: Reports = {}
    for entry in journal.entries():
        found |= journal.read(entry)
    return found


def _is_whole(writer: PartsWriter, shard: ShardLike) -> bool:
    path = writer.partial / shard.name
    return path.exists() and path.stat().st_size == shard.size_bytes


class _Parts:
    """The parts of one process's share: each is entered in the journal when the last of its tensors is done."""

    def __init__(self, plans: Sequence[TensorPlan], source: ShardedSource, writer: PartsWriter, ranks: Ranks) -> None:
        infos = source.infos()
        self.numbers = part_numbers(
            [plan.name for plan in plans],
            lambda name: source.shard_of(name).name,
            lambda name: infos[name].size_bytes,
        )
        self.entries: list[str] = []
        self._left = Counter(self.numbers.values())
        self._reports: dict[int, Reports] = {part: {} for part in self._left}
        self._writer, self._ranks, self._lock = writer, ranks, threading.Lock()

    def done(self, plan: TensorPlan, reports: list[TensorReport]) -> None:
        """Take the reports of a tensor that is written; called from several threads."""
        self._ranks.check()
        part = self.numbers[plan.name]
        with self._lock:
            self._reports[part][plan.name] = reports
            self._left[part] -= 1
            is_last = self._left[part] == 0
        if is_last:
            self.entries.append(self._writer.finish(self._reports.pop(part)))


class _Folder:
    """The new folder as a target: every shard is the aligned one's header, then the tensors at their places."""

    def __init__(self, source: ShardedSource, writer: PartsWriter, names: set[str]) -> None:
        self._source = source
        self._places: dict[str, tuple[OutputFile, int]] = {}
        # A float8 weight's scales are written with it.
        names = names | {name for name, info in source.infos().items() if info.scale_of in names}
        for shard in source.shards:
            if not names.isdisjoint(shard.entries):
                file = writer.open(shard.name)
                self._places |= {name: (file, entry.start) for name, entry in shard.entries.items()}

    def sink(self, plan: TensorPlan, aligned: Tensor) -> MatrixSink:
        """Return what writes finished rows to their place in the file."""
        file, start = self._places[plan.name]
        return row_sink(aligned, start, file.write)

    def copy(self, plan: TensorPlan) -> None:
        """Copy the aligned bytes."""
        file, start = self._places[plan.name]
        raw = self._source.raw(plan.name)
        for position in range(0, len(raw), COPY_BYTES):
            file.write(raw[position : position + COPY_BYTES], start + position)
