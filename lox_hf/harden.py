"""`harden_checkpoint`: disk to disk in constant memory. Resolve, plan, validate, execute, publish."""

import json
import tempfile
import time
from pathlib import Path

import torch

from lox_hf.adapter_files import harden_adapter, plan_adapter
from lox_hf.config import CONFIG_NAME, LoxConfig
from lox_hf.errors import CheckpointError, OutputError
from lox_hf.hub_files import CHECKPOINT_FILES, Resolved, find_repository, is_offline, resolve
from lox_hf.inputs import HasFactors, ModelLike, Pair, make_report, open_pair
from lox_hf.parallel.device import resolve_device
from lox_hf.parallel.ranks import Ranks
from lox_hf.provenance import STAMP, stamp
from lox_hf.records import REPORT_NAME, HardeningPlan, HardeningReport
from lox_hf.weight_files import (
    NOT_ON_FILES,
    check_agreement,
    run_identity,
    source_of,
    times_of,
    wait_until,
    write_weights,
)
from lox_hf.weights.folder import MODEL_CONFIG, is_adapter, model_config, side_files
from lox_hf.weights.parts_writer import PartsWriter
from lox_hf.weights.planned import has_no_weights, plan_from_config
from lox_hf.weights.shard import ShardLike
from lox_hf.weights.source import INDEX_NAME, WEIGHTS_NAME
from lox_hf.weights.writer import FolderWriter


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
    device: str | torch.device | None = None,
    ranks: Ranks | None = None,
) -> HardeningReport:
    """Harden a checkpoint on disk: W + alpha * Proj_k(W - W_base) for every selected tensor (section 3).

    Memory does not grow with the model: tensors are mapped, decomposed and written in tiles. The output has the same
    shards, tensor names, dtypes, metadata and side files as the aligned checkpoint; `config.json` gets the settings as
    `lox_config`, and `lox_config.json` and `lox_report.json` are added. It appears by one rename when all is done: a
    run that is killed leaves the inputs untouched and no output, and the same call goes on from what it had finished.

    Args:
        model_name_or_path: The aligned model: folder or Hub id of a safetensors checkpoint in float32, float16,
            bfloat16 or float8, or of a PEFT LoRA adapter, which needs no base and gives a hardened adapter.
        output_dir: Folder to create; it must not exist, or be empty.
        config: Settings; None takes the defaults (r=6, alpha=1.25).
        base_model: The model before alignment, or a `SafetySubspace`; None takes `config.base_model_name_or_path`, or
            what the aligned model's own files name.
        revision: Revision of the aligned model on the Hub.
        token: Hub token; None uses the stored login.
        trust_remote_code: Run modelling code of the aligned model's repository where "all-linear" needs it.
        allow_repeat: Harden a model that is hardened already once more.
        progressbar: Show a progress bar; None shows one on a terminal only.
        num_workers: Threads on the CPU; None takes torch's number of threads.
        device: Where the directions are found and added, such as "cpu" or "cuda:1"; None and "auto" take the
            accelerator where there is one, under torchrun each process its own.
        ranks: Processes that share the work, from `join_ranks`: every one of them makes the same call, on one shared
            file system, and the output is the same as from one process. None works alone.

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
        DistributedError: If the processes disagree, or another one failed or was lost; what is finished stays.

    Example:
        >>> from lox_hf import LoxConfig, harden_checkpoint
        >>> config = LoxConfig("meta-llama/Llama-2-7b-hf", r=6, alpha=1.25)
        >>> report = harden_checkpoint("org/aligned", "aligned-lox", config)  # doctest: +SKIP
        >>> print(f"{report.energy_share:.0%} of the change was added again")  # doctest: +SKIP

    Source: Perin et al., COLM 2025, section 3; the reference's safety/LoX.py.
    """
    ranks, place = ranks or Ranks(), resolve_device(device)
    aligned = resolve(model_name_or_path, revision=revision, token=token, files=CHECKPOINT_FILES)
    if is_adapter(aligned.folder):  # too small to share
        if ranks.is_first:
            harden_adapter(aligned, output_dir, config or LoxConfig(), allow_repeat=allow_repeat)
    else:
        pair = open_pair(
            model_name_or_path,
            base_model,
            config,
            revision=revision,
            token=token,
            trust_remote_code=trust_remote_code,
            allow_repeat=allow_repeat,
        )
        _harden(pair, output_dir, ranks, device=place, num_workers=num_workers, progressbar=progressbar)
    ranks.from_first("published")
    path = Path(output_dir).expanduser().absolute() / REPORT_NAME
    if not wait_until(path.is_file, path.parent):
        raise OutputError(f"This process does not see {path}, which process 0 has published.")
    return HardeningReport.from_json(path.read_text(encoding="utf-8"))


def _harden(
    pair: Pair,
    output_dir: str | Path,
    ranks: Ranks,
    *,
    device: torch.device,
    num_workers: int | None,
    progressbar: bool | None,
) -> None:
    """Check, write, and publish: together, except that process 0 alone makes and publishes the folder."""
    started = time.perf_counter()
    output = Path(output_dir).expanduser().absolute()
    plan, run = plan_files(pair), run_identity(pair, str(output), device)
    times = {"times": times_of(pair)} if ranks.is_first else {}  # machines may have copies of their own
    writer = PartsWriter(output_dir, run | times, is_first=ranks.is_first, is_shared=ranks.size > 1)
    if ranks.is_first:
        writer.check(plan.total_bytes, _inputs(pair))
    check_agreement(ranks, run)
    with writer, ranks.telling():
        reports = write_weights(
            pair, writer, ranks, device=device, num_workers=num_workers, progressbar=progressbar
        )
        if not ranks.is_first:
            return
        report = make_report(pair, reports, time.perf_counter() - started, str(output_dir))
        for name, content in other_files(pair, plan, report).items():
            if isinstance(content, Path):
                writer.copy(content, name)
            else:
                writer.write(name, content)
        with ranks.publishing():
            writer.publish()


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
        output_dir: Where the output would go; checked when given. None reads headers alone of models on the Hub, and
            also plans a model whose weights are not there, from its `config.json`.
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
    headers_alone = output_dir is None and _is_on_hub(model_name_or_path, revision, token)
    if not headers_alone:
        aligned = resolve(model_name_or_path, revision=revision, token=token, files=CHECKPOINT_FILES)
        if is_adapter(aligned.folder):
            return plan_adapter(aligned, config or LoxConfig(), output_dir=output_dir, allow_repeat=allow_repeat)
        if output_dir is None and has_no_weights(aligned.folder):
            return plan_from_config(
                aligned, config or LoxConfig(), trust_remote_code=trust_remote_code, allow_repeat=allow_repeat
            )
    pair = open_pair(
        model_name_or_path,
        base_model,
        config,
        revision=revision,
        token=token,
        trust_remote_code=trust_remote_code,
        allow_repeat=allow_repeat,
        stream_in=Path(tempfile.gettempdir()) if headers_alone else None,
    )
    plan = plan_files(pair)
    if output_dir is not None:
        FolderWriter(output_dir).check(plan.total_bytes, _inputs(pair))
    return plan


def _is_on_hub(name: str | Path, revision: str | None, token: str | bool | None) -> bool:
    """Whether this is a full checkpoint on the Hub: no folder, no adapter, no model without weights."""
    if Path(name).expanduser().exists() or is_offline():
        return False
    _, files = find_repository(name, revision=revision, token=token)
    return WEIGHTS_NAME in files or INDEX_NAME in files


def plan_files(pair: Pair) -> HardeningPlan:
    """Put the plan of a checkpoint on files together.

    Args:
        pair: Both models.

    Returns:
        The plan.

    Raises:
        CheckpointError: If the aligned model is no checkpoint on files.
    """
    copied, left_out = side_files(files_of(pair).folder)
    return HardeningPlan(
        aligned=pair.aligned.reference,
        base=pair.factors.reference,
        base_found_in=pair.base_found_in,
        tensors=tuple(pair.plans),
        total_bytes=sum(info.size_bytes for info in pair.aligned.source.infos().values()),
        files=tuple(str(path) for path in copied),
        left_out=tuple(str(path) for path in left_out if path.name not in {shard.name for shard in shards_of(pair)}),
    )


def other_files(pair: Pair, plan: HardeningPlan, report: HardeningReport) -> dict[str, Path | bytes]:
    """Everything of a hardened checkpoint but its weights.

    Args:
        pair: Both models.
        plan: The plan.
        report: What was done.

    Returns:
        Content by name: a file of the aligned model, or bytes.
    """
    folder = files_of(pair).folder
    files: dict[str, Path | bytes] = {
        name: folder / name for name in plan.files if name not in (CONFIG_NAME, REPORT_NAME)
    }
    if [shard.name for shard in shards_of(pair)] != [WEIGHTS_NAME]:
        files[INDEX_NAME] = folder / INDEX_NAME
    stamped = {**model_config(folder), STAMP: stamp(pair.config, pair.aligned.reference, pair.factors.reference)}
    files[MODEL_CONFIG] = (json.dumps(stamped, indent=2, ensure_ascii=False) + "\n").encode()
    files[CONFIG_NAME] = pair.config.to_json().encode()
    files[REPORT_NAME] = report.to_json().encode()
    return files


def shards_of(pair: Pair) -> list[ShardLike]:
    """The aligned model's weight files."""
    return source_of(pair).shards


def files_of(pair: Pair) -> Resolved:
    """The aligned model's folder."""
    if pair.aligned.files is None:
        raise CheckpointError(NOT_ON_FILES)
    return pair.aligned.files


def _inputs(pair: Pair) -> list[Path]:
    return [side.folder for side in (pair.aligned.files, pair.base) if side is not None]
