"""`harden_checkpoint`: disk to disk in constant memory. Resolve, plan, validate, execute, publish."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lox_hf.adapter_files import harden_adapter, plan_adapter
from lox_hf.config import CONFIG_NAME, LoxConfig
from lox_hf.edit import edit_tensor
from lox_hf.errors import CheckpointError
from lox_hf.hub_files import CHECKPOINT_FILES, resolve
from lox_hf.inputs import HasFactors, ModelLike, Pair, make_report, open_pair
from lox_hf.parallel import map_tensors
from lox_hf.provenance import STAMP, stamp
from lox_hf.records import REPORT_NAME, HardeningPlan, HardeningReport, TensorPlan, TensorReport
from lox_hf.weights.folder import MODEL_CONFIG, is_adapter, model_config, side_files
from lox_hf.weights.selection import matrix_shape
from lox_hf.weights.shard import Shard
from lox_hf.weights.source import INDEX_NAME, CheckpointSource
from lox_hf.weights.writer import COPY_BYTES, FolderWriter, OutputFile


def harden_checkpoint(
    model_name_or_path: str | Path,
    output_dir: str | Path,
    config: LoxConfig | None = None,
    *,
    base_model: ModelLike | HasFactors | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    allow_repeat: bool = False,
    progressbar: bool | None = None,
    num_workers: int | None = None,
) -> HardeningReport:
    """Harden a checkpoint on disk: W + alpha * Proj_k(W - W_base) for every selected tensor (section 3).

    Memory does not grow with the model: tensors are mapped, decomposed and written in tiles. The output has the same
    shards, tensor names, dtypes, metadata and side files as the aligned checkpoint; `config.json` gets the settings as
    `lox_config`, and `lox_config.json` and `lox_report.json` are added. It appears by one rename when all is done: a
    run that is killed leaves the inputs untouched and no output, and the next run cleans up after it.

    Args:
        model_name_or_path: The aligned model: folder or Hub id of a safetensors checkpoint in float32, float16 or
            bfloat16, or of a PEFT LoRA adapter, which needs no base and gives a hardened adapter.
        output_dir: Folder to create; it must not exist, or be empty.
        config: Settings; None takes the defaults (r=6, alpha=1.25).
        base_model: The model before alignment, or a `SafetySubspace`; None takes `config.base_model_name_or_path`, or
            what the aligned model's own files name.
        revision: Revision of the aligned model on the Hub.
        token: Hub token; None uses the stored login.
        trust_remote_code: Run modelling code of the aligned model's repository where "all-linear" needs it.
        allow_repeat: Harden a model that is hardened already once more.
        progressbar: Show a progress bar; None shows one on a terminal only.
        num_workers: Threads; None takes torch's number of threads.

    Returns:
        What was done to each matrix, and in total.

    Raises:
        ConfigError: If no base is named, or the settings select nothing.
        PairingError: If the two models do not fit, or are equal; all mismatches are listed.
        CheckpointError: If files are missing or damaged.
        UnsupportedModelError: If the checkpoint is quantised or in a dtype that cannot be edited.
        NumericsError: If a matrix contains NaN or Inf, or the result overflows; it is named.
        OutputError: If the output exists, is an input, or cannot be written.
        AlreadyHardenedError: If the model is hardened and `allow_repeat` is not set.

    Example:
        >>> from lox_hf import LoxConfig, harden_checkpoint
        >>> config = LoxConfig("meta-llama/Llama-2-7b-hf", r=6, alpha=1.25)
        >>> report = harden_checkpoint("org/aligned", "aligned-lox", config)  # doctest: +SKIP
        >>> print(f"{report.energy_share:.0%} of the change was added again")  # doctest: +SKIP

    Source: Perin et al., COLM 2025, section 3; the reference's safety/LoX.py.
    """
    started = time.perf_counter()
    aligned = resolve(model_name_or_path, revision=revision, token=token, files=CHECKPOINT_FILES)
    if is_adapter(aligned.folder):
        return harden_adapter(aligned, output_dir, config or LoxConfig(), allow_repeat=allow_repeat)
    pair = open_pair(
        model_name_or_path,
        base_model,
        config,
        revision=revision,
        token=token,
        trust_remote_code=trust_remote_code,
        allow_repeat=allow_repeat,
    )
    plan, writer = _plan(pair), FolderWriter(output_dir)
    writer.check(plan.total_bytes, _inputs(pair))
    with writer:
        reports = _write_weights(pair, writer, progressbar, num_workers)
        report = make_report(pair, reports, time.perf_counter() - started, str(output_dir))
        _write_side_files(pair, plan, writer, report)
        writer.publish()
    return report


def plan_hardening(
    model_name_or_path: str | Path,
    config: LoxConfig | None = None,
    *,
    output_dir: str | Path | None = None,
    base_model: ModelLike | HasFactors | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    allow_repeat: bool = False,
) -> HardeningPlan:
    """Plan `harden_checkpoint` without writing anything: every check that needs no numbers is made.

    Args:
        model_name_or_path: See `harden_checkpoint`.
        config: Settings.
        output_dir: Where the output would go; checked when given.
        base_model: See `harden_checkpoint`.
        revision: Revision of the aligned model on the Hub.
        token: Hub token.
        trust_remote_code: See `harden_checkpoint`.
        allow_repeat: See `harden_checkpoint`.

    Returns:
        What would be done to every tensor, and why.

    Raises:
        LoxError: As `harden_checkpoint` would.

    Example:
        >>> plan = plan_hardening("org/aligned", LoxConfig("org/base"))  # doctest: +SKIP
        >>> [tensor.reason for tensor in plan.tensors if not tensor.edit]  # doctest: +SKIP
    """
    aligned = resolve(model_name_or_path, revision=revision, token=token, files=CHECKPOINT_FILES)
    if is_adapter(aligned.folder):
        return plan_adapter(aligned, config or LoxConfig(), output_dir=output_dir, allow_repeat=allow_repeat)
    pair = open_pair(
        model_name_or_path,
        base_model,
        config,
        revision=revision,
        token=token,
        trust_remote_code=trust_remote_code,
        allow_repeat=allow_repeat,
    )
    plan = _plan(pair)
    if output_dir is not None:
        FolderWriter(output_dir).check(plan.total_bytes, _inputs(pair))
    return plan


def _plan(pair: Pair) -> HardeningPlan:
    folder = _folder(pair)
    copied, left_out = side_files(folder)
    return HardeningPlan(
        aligned=pair.aligned.reference,
        base=pair.factors.reference,
        base_found_in=pair.base_found_in,
        tensors=tuple(pair.plans),
        total_bytes=sum(info.size_bytes for info in pair.aligned.source.infos().values()),
        files=tuple(str(path) for path in copied),
        left_out=tuple(
            str(path) for path in left_out if path.name not in {shard.path.name for shard in _shards(pair)}
        ),
    )


def _write_weights(
    pair: Pair, writer: FolderWriter, progressbar: bool | None, num_workers: int | None
) -> tuple[TensorReport, ...]:
    """Write every shard: the aligned shard's header byte for byte, then its tensors at their places."""
    source = pair.aligned.source
    infos = source.infos()
    places: dict[str, tuple[OutputFile, int]] = {}
    for shard in _shards(pair):
        file = writer.create(shard.path.name, shard.path.stat().st_size)
        file.write(shard.bytes(0, shard.header_bytes), 0)
        places |= {name: (file, entry.start) for name, entry in shard.entries.items()}

    def prepare(plan: TensorPlan) -> None:
        source.prefetch(plan.name)
        if plan.edit:
            pair.factors.prefetch(plan.name)

    def work(plan: TensorPlan) -> list[TensorReport]:
        file, start = places[plan.name]
        if plan.edit:
            tensor = source.get(plan.name)
            reports = edit_tensor(plan, tensor, pair.factors, _file_sink(tensor, file, start))
            pair.factors.release(plan.name)
        else:
            _copy_bytes(shard_of[plan.name], plan.name, file, start)
            reports = []
        source.release(plan.name)
        return reports

    shard_of = {name: shard for shard in _shards(pair) for name in shard.entries}
    results = map_tensors(
        work,
        pair.plans,
        size_of=lambda plan: infos[plan.name].size_bytes,
        num_workers=num_workers,
        progressbar=progressbar,
        description="Hardening",
        prepare=prepare,
    )
    return tuple(report for reports in results for report in reports)


def _file_sink(tensor: Tensor, file: OutputFile, start: int) -> Callable[[int, slice, Tensor], None]:
    _, rows, columns = matrix_shape(tuple(tensor.shape))
    row_bytes = columns * tensor.element_size()

    def sink(number: int, part: slice, tile: Tensor) -> None:
        file.write(as_bytes(tile), start + (number * rows + part.start) * row_bytes)

    return sink


def as_bytes(rows: Tensor) -> memoryview:
    """Bytes of a CPU tensor of any dtype, without a copy where it is contiguous."""
    return rows.contiguous().view(-1).view(torch.uint8).numpy().data


def _copy_bytes(shard: Shard, name: str, file: OutputFile, start: int) -> None:
    entry = shard.entries[name]
    for position in range(entry.start, entry.stop, COPY_BYTES):
        stop = min(position + COPY_BYTES, entry.stop)
        file.write(shard.bytes(position, stop), start + position - entry.start)


def _write_side_files(pair: Pair, plan: HardeningPlan, writer: FolderWriter, report: HardeningReport) -> None:
    folder = _folder(pair)
    for name in plan.files:
        if name not in (CONFIG_NAME, REPORT_NAME):
            writer.copy(folder / name, name)
    if (folder / INDEX_NAME).is_file() and len(_shards(pair)) > 0 and not (folder / "model.safetensors").is_file():
        writer.copy(folder / INDEX_NAME, INDEX_NAME)
    stamped = {**model_config(folder), STAMP: stamp(pair.config, pair.aligned.reference, pair.factors.reference)}
    writer.write(MODEL_CONFIG, _json(stamped))
    writer.write(CONFIG_NAME, pair.config.to_json().encode())
    writer.write(REPORT_NAME, report.to_json().encode())


def _json(data: dict) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def _shards(pair: Pair) -> list[Shard]:
    source = pair.aligned.source
    if not isinstance(source, CheckpointSource):
        raise CheckpointError("harden_checkpoint works on files; for a model in memory use apply_lox.")
    return source.shards


def _folder(pair: Pair) -> Path:
    if pair.aligned.files is None:
        raise CheckpointError("harden_checkpoint works on files; for a model in memory use apply_lox.")
    return pair.aligned.files.folder


def _inputs(pair: Pair) -> list[Path]:
    return [side.folder for side in (pair.aligned.files, pair.base) if side is not None]
