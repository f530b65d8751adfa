"""Harden from the Hub to the Hub, shard by shard: a model may be larger than the disk."""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from lox_hf.config import LoxConfig
from lox_hf.edit.model import edit_tensors
from lox_hf.edit.scaled import storing
from lox_hf.edit.tensor import MatrixSink
from lox_hf.errors import OutputError, UnsupportedModelError
from lox_hf.harden import plan_files, shards_of
from lox_hf.hub.repository import Repository
from lox_hf.hub_files import find_repository
from lox_hf.inputs import HasFactors, ModelLike, Pair, make_report, open_pair
from lox_hf.records import HardeningPlan, HardeningReport, TensorPlan, TensorReport
from lox_hf.weight_files import row_sink, source_of
from lox_hf.weights.folder import is_adapter
from lox_hf.weights.output_file import OutputFile, output_errors
from lox_hf.weights.shard import Shard
from lox_hf.weights.source import ADAPTER_CONFIG, INDEX_NAME, WEIGHTS_NAME
from lox_hf.weights.writer import FolderWriter


def harden_to_hub(
    model_name_or_path: str | Path,
    repo_id: str,
    config: LoxConfig | None = None,
    *,
    base_model: ModelLike | HasFactors | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    private: bool = True,
    commit_message: str = "Hardened with LoX",
    work_dir: str | Path | None = None,
    trust_remote_code: bool = False,
    allow_repeat: bool = False,
    progressbar: bool | None = None,
    num_workers: int | None = None,
) -> HardeningReport:
    """Harden a checkpoint and publish it, with at most two shards on this machine's disk at any time.

    One aligned shard after the other is downloaded, edited in place, uploaded and deleted; of the base only the
    tensors come that are edited, each when it is needed. What lies in folders or in the Hub's cache is read there.
    The files are byte for byte those of `harden_checkpoint`. One commit at the end publishes them together with the
    card: until then the repository shows nothing. A run that was killed is started again: it computes again, and
    shards that the Hub has already are not sent again.

    Args:
        model_name_or_path: The aligned model: Hub id or folder of a safetensors checkpoint.
        repo_id: Hub id of the hardened model; the repository is made if needed.
        config: Settings; None takes the defaults (r=6, alpha=1.25).
        base_model: See `harden_checkpoint`.
        revision: Revision of the aligned model on the Hub; it is resolved to its commit first.
        token: Hub token; None uses the stored login.
        private: Make the repository private. A repository that is public already is then refused.
        commit_message: Message of the commit.
        work_dir: Folder for the shard in work; None takes the one for temporary files (TMPDIR).
        trust_remote_code: See `harden_checkpoint`.
        allow_repeat: Harden a model that is hardened already once more.
        progressbar: Show progress bars; None shows them on a terminal only.
        num_workers: Threads; None takes torch's number of threads.

    Returns:
        What was done to each matrix, and in total; its `output` is the URL of the commit.

    Raises:
        UnsupportedModelError: If the aligned model is an adapter, which needs no such care.
        ConfigError: If the repository's id or the token is none.
        OutputError: If the repository is an input, holds other weights, or is public and `private` is set, or the work
            folder is too small.
        CheckpointError: If the Hub refuses or cannot be reached, or files are missing or damaged.
        LoxError: As `harden_checkpoint` would.

    Example:
        >>> config = LoxConfig("meta-llama/Llama-2-7b-hf", r=6, alpha=1.25)
        >>> report = harden_to_hub("org/aligned", "org/aligned-lox", config)  # doctest: +SKIP
        >>> report.output  # doctest: +SKIP
        'https://huggingface.co/org/aligned-lox/commit/...'
    """
    started = time.perf_counter()
    repository = Repository(repo_id, token)
    scratch = FolderWriter(Path(work_dir or tempfile.gettempdir()) / f"lox-hf--{repo_id.replace('/', '--')}")
    pair = _open(
        model_name_or_path,
        config,
        work_dir=scratch.output.parent,
        base_model=base_model,
        revision=revision,
        token=token,
        trust_remote_code=trust_remote_code,
        allow_repeat=allow_repeat,
    )
    plan = plan_files(pair)
    scratch.check(2 * max(shard.size_bytes for shard in shards_of(pair)), [])
    repository.check(pair, private=private)
    with scratch:
        repository.create(private=private)
        reports: tuple[TensorReport, ...] = ()
        for shard in shards_of(pair):
            path = scratch.partial / shard.name
            shard.save(path)
            reports += _harden_in_place(pair, path, progressbar, num_workers)
            repository.send(path)
        report = make_report(pair, reports, time.perf_counter() - started, repo_id)
        url = repository.publish(pair, plan, report, commit_message)
    return replace(report, output=url)


def plan_to_hub(
    model_name_or_path: str | Path,
    repo_id: str,
    config: LoxConfig | None = None,
    *,
    base_model: ModelLike | HasFactors | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    private: bool = True,
    work_dir: str | Path | None = None,
    trust_remote_code: bool = False,
    allow_repeat: bool = False,
) -> HardeningPlan:
    """Plan `harden_to_hub`: every check that needs no numbers is made, from headers alone; nothing is written.

    Args:
        model_name_or_path: See `harden_to_hub`.
        repo_id: See `harden_to_hub`.
        config: Settings.
        base_model: See `harden_checkpoint`.
        revision: Revision of the aligned model on the Hub.
        token: Hub token.
        private: See `harden_to_hub`.
        work_dir: See `harden_to_hub`.
        trust_remote_code: See `harden_checkpoint`.
        allow_repeat: See `harden_checkpoint`.

    Returns:
        What would be done to every tensor, and why.

    Raises:
        LoxError: As `harden_to_hub` would.

    Example:
        >>> plan = plan_to_hub("org/aligned", "org/aligned-lox", LoxConfig("org/base"))  # doctest: +SKIP
        >>> len(plan.edited)  # doctest: +SKIP
        226
    """
    repository = Repository(repo_id, token)
    pair = _open(
        model_name_or_path,
        config,
        work_dir=Path(work_dir or tempfile.gettempdir()),
        base_model=base_model,
        revision=revision,
        token=token,
        trust_remote_code=trust_remote_code,
        allow_repeat=allow_repeat,
    )
    repository.check(pair, private=private)
    return plan_files(pair)


def _open(
    model: str | Path,
    config: LoxConfig | None,
    *,
    work_dir: Path,
    base_model: ModelLike | HasFactors | None,
    revision: str | None,
    token: str | bool | None,
    trust_remote_code: bool,
    allow_repeat: bool,
) -> Pair:
    """Open both sides where they are."""
    if not work_dir.is_dir():
        raise OutputError(f"There is no folder {work_dir} for the work.")
    folder, names = Path(model).expanduser(), frozenset[str]()
    if not folder.exists():
        found, names = find_repository(model, revision=revision, token=token)
        revision = found.reference.revision
    if is_adapter(folder) or (ADAPTER_CONFIG in names and not {WEIGHTS_NAME, INDEX_NAME} & names):
        raise UnsupportedModelError(
            f"'{model}' is an adapter, which is small: harden it into a folder, look at it, and push that folder "
            "(lox-hf harden, then lox-hf push)."
        )
    pair = open_pair(
        model,
        base_model,
        config,
        revision=revision,
        token=token,
        trust_remote_code=trust_remote_code,
        allow_repeat=allow_repeat,
        stream_in=work_dir,
    )
    for shard in shards_of(pair):
        source_of(pair).within([shard])  # each is worked on alone
    return pair


class _InPlace:
    """A downloaded aligned shard as a target: edited rows are written over the aligned ones, the rest stays.

    Rows are read before they are written over: the directions are known by then, and tiles do not overlap.
    """

    def __init__(self, shard: Shard, file: OutputFile) -> None:
        self._shard, self._file = shard, file

    def sink(self, plan: TensorPlan, aligned: Tensor) -> MatrixSink:
        """Return what writes finished rows over the aligned ones."""
        return row_sink(aligned, self._shard.entries[plan.name].start, self._file.write)

    def copy(self, plan: TensorPlan) -> None:
        """Leave it as it is."""


def _harden_in_place(
    pair: Pair, path: Path, progressbar: bool | None, num_workers: int | None
) -> tuple[TensorReport, ...]:
    shard = Shard(path)
    source = source_of(pair).within([shard])
    file = OutputFile(path, None, path)
    try:
        return edit_tensors(
            [plan for plan in pair.plans if plan.name in shard.entries],
            source,
            pair.factors,
            storing(_InPlace(shard, file), source),
            num_workers=num_workers,
            progressbar=progressbar,
            description=shard.name,
        )
    finally:
        with output_errors(path):
            file.close()
