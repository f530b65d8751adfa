"""Is a published model what it says? Its weights are computed again from the two models that it names."""

import tempfile
import time
from pathlib import Path

from lox_hf.edit.model import edit_tensors
from lox_hf.edit.scaled import storing
from lox_hf.errors import CheckpointError, OutputError, UnsupportedModelError
from lox_hf.hub.claim import Claim, read_stamp
from lox_hf.hub.comparing import BothSources, Comparison, misfits
from lox_hf.hub_files import CHECKPOINT_FILES, Resolved, find_repository, is_offline
from lox_hf.inputs import Pair, Side, open_pair, open_side
from lox_hf.records import TensorCheck, VerificationReport
from lox_hf.subspace import SUBSPACE_NAME
from lox_hf.version import versions
from lox_hf.weights.scaled import ScaledSource
from lox_hf.weights.source import ADAPTER_CONFIG, INDEX_NAME, WEIGHTS_NAME, ShardedSource


def verify(
    model_name_or_path: str | Path,
    *,
    aligned: str | Path | None = None,
    base: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    exact: bool = False,
    work_dir: str | Path | None = None,
    progressbar: bool | None = None,
    num_workers: int | None = None,
) -> VerificationReport:
    """Recompute W + alpha * Proj_r(W - W_base) for every tensor and compare it with what is published, bit by bit.

    The settings and the two models with their revisions are those of the stamp in `config.json`, and report and card
    must say the same. Tensors that LoX does not edit must be the aligned model's. Another processor rounds sums in
    another order, so an edited tensor may differ and pass: in bfloat16 and float16 where at most one in a hundred of
    the numbers that LoX changes differs, none by more than one spacing; in float32 where the difference is below
    `svd_tol` (1e-3 at most) of the change, in norm and at its largest. Such tensors are counted apart ("rounding").
    Everything is streamed: memory does not grow with the model, and of models on the Hub at most two tensors a thread
    lie on disk, of each of the three. No code of a repository is run.

    Args:
        model_name_or_path: The published model: folder or Hub id of a hardened checkpoint.
        aligned: Where the aligned model lies, if not where the stamp says: folder or Hub id.
        base: Where the base lies, if not where the stamp says.
        revision: Revision of the published model on the Hub.
        token: Hub token; None uses the stored login.
        exact: Take differences by rounding as wrong too.
        work_dir: Folder for the tensors in work; None takes the one for temporary files (TMPDIR).
        progressbar: Show a progress bar; None shows one on a terminal only.
        num_workers: Threads; None takes torch's number of threads.

    Returns:
        A check of every tensor, and whether nothing is wrong.

    Raises:
        CheckpointError: If the model does not say what it is, or one of the three cannot be found or read.
        ConfigError: If the settings in the stamp are invalid.
        UnsupportedModelError: If it is an adapter or a subspace.
        OutputError: If there is no such work folder.
        PairingError: If the two models that are named do not fit together.
        LoxError: As hardening would.

    Example:
        >>> from lox_hf import verify
        >>> report = verify("org/aligned-lox")  # doctest: +SKIP
        >>> report.verified  # doctest: +SKIP
        True
    """
    started = time.perf_counter()
    folder = Path(work_dir or tempfile.gettempdir())
    if not folder.is_dir():
        raise OutputError(f"There is no folder {folder} for the work.")
    _refuse_others(model_name_or_path, revision, token)
    published = open_side(
        model_name_or_path, "published", revision=revision, token=token, files=CHECKPOINT_FILES, stream_in=folder
    )
    claim = read_stamp(_files(published).folder, str(model_name_or_path)).by(aligned, base)
    pair = _open_named(claim, token, folder)
    checks = _compare(pair, _sharded(published), num_workers, progressbar)
    allowed = ("exact",) if exact else ("exact", "rounding")
    return VerificationReport(
        model=published.reference,
        aligned=pair.aligned.reference,
        base=pair.factors.reference,
        config=claim.config.to_dict(),
        verified=not claim.problems and all(check.verdict in allowed for check in checks),
        tensors=checks,
        problems=claim.problems,
        seconds=time.perf_counter() - started,
        versions=versions(),
    )


def _refuse_others(model: str | Path, revision: str | None, token: str | bool | None) -> None:
    """Refuse what is no checkpoint by what it is, before its weights are missed."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        names = frozenset(path.name for path in folder.iterdir())
    elif folder.exists() or is_offline():  # opening it says what is wrong
        return
    else:
        _, names = find_repository(model, revision=revision, token=token)
    kinds = (SUBSPACE_NAME, "a subspace"), (ADAPTER_CONFIG, "an adapter")
    kind = next((words for name, words in kinds if name in names), None)
    if kind is not None and not {WEIGHTS_NAME, INDEX_NAME} & names:
        raise UnsupportedModelError(
            f"'{model}' is {kind}: verify compares hardened checkpoints only. Make it anew from the two models that "
            "it names, and compare."
        )


def _open_named(claim: Claim, token: str | bool | None, work_dir: Path) -> Pair:
    """Open the two models that are named; code of theirs is not run, and the aligned one may be hardened itself."""
    try:
        return open_pair(
            claim.aligned.name_or_path,
            None,
            claim.config,
            revision=claim.aligned.revision,
            token=token,
            allow_repeat=True,
            stream_in=work_dir,
        )
    except CheckpointError as error:
        raise CheckpointError(
            f"A model that it was made of cannot be read: {error} If it lies elsewhere, say where with aligned "
            "(--aligned) or base (--base)."
        ) from error


def _compare(
    pair: Pair, published: ShardedSource, num_workers: int | None, progressbar: bool | None
) -> tuple[TensorCheck, ...]:
    aligned = _sharded(pair.aligned)
    scales = aligned.scales if isinstance(aligned, ScaledSource) else {}
    wrong = misfits(pair.plans, aligned.infos(), published.infos(), scales)
    plans = [plan for plan in pair.plans if plan.name not in wrong]
    stored = ShardedSource(published.shards, published.label)  # compared as it is stored, whatever it stands for
    target = Comparison(aligned, stored, pair.config.svd_tol)
    edit_tensors(
        plans,
        BothSources(aligned, published),
        pair.factors,
        storing(target, aligned),
        num_workers=num_workers,
        progressbar=progressbar,
        description="Verifying",
    )
    checks = {**wrong, **{plan.name: target.check(plan) for plan in plans}}
    order = dict.fromkeys([*(plan.name for plan in pair.plans), *checks])
    return tuple(checks[name] for name in order)


def _sharded(side: Side) -> ShardedSource:
    if not isinstance(side.source, ShardedSource):
        raise CheckpointError(f"{side.source.label} is no checkpoint on files.")
    return side.source


def _files(side: Side) -> Resolved:
    if side.files is None:
        raise CheckpointError(f"{side.source.label} is no checkpoint on files.")
    return side.files
