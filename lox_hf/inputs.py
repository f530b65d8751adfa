"""From what a user names (ids, folders, models, a subspace) to tensors, plans and a source of directions."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn

from lox_hf.config import ALL_LINEAR, LoxConfig
from lox_hf.edit.tensor import BaseFactors, FactorSource, check_something_changed, report_warnings
from lox_hf.errors import CheckpointError, ConfigError
from lox_hf.hub_files import BASE_FILES, CHECKPOINT_FILES, Resolved, fetch_file, is_offline, resolve
from lox_hf.provenance import STAMP, check_not_hardened
from lox_hf.records import HardeningReport, ModelReference, TensorPlan, TensorReport
from lox_hf.version import versions
from lox_hf.weights.folder import CARD, check_dense, check_roles, model_config, named_base
from lox_hf.weights.live import as_checkpoint, linear_modules, meta_model
from lox_hf.weights.remote import open_remote
from lox_hf.weights.scaled import with_scales
from lox_hf.weights.selection import select
from lox_hf.weights.source import CheckpointSource, DictSource, WeightSource
from lox_hf.weights.spread.model import SpreadSource, check_same, is_spread, open_model, refuse_base, together

ModelLike: TypeAlias = str | Path | nn.Module | Mapping[str, Tensor]


@runtime_checkable
class HasFactors(Protocol):
    """Something that holds directions already, such as a `SafetySubspace`."""

    @property
    def config(self) -> LoxConfig:
        """The settings they were made with."""
        ...

    @property
    def report(self) -> HardeningReport:
        """What is known about them."""
        ...

    def factor_source(self) -> FactorSource:
        """Return the directions by matrix."""
        ...


@dataclass(frozen=True)
class Side:
    """One of the two models.

    Attributes:
        source: Its tensors by checkpoint name.
        reference: Name and revision, for reports.
        files: Its folder; None for a model in memory.
    """

    source: WeightSource
    reference: ModelReference
    files: Resolved | None = None


@dataclass(frozen=True)
class Pair:
    """The aligned model, where its directions come from, and the plan; everything that needs no numbers is checked.

    Attributes:
        aligned: The aligned model.
        factors: Where the directions come from.
        plans: What is done to each tensor, in file order.
        config: The settings with the base that was found.
        base: The base's folder; None for a base in memory and for a subspace.
        base_found_in: Where the base was named: "config", or the file of the aligned model.
    """

    aligned: Side
    factors: FactorSource
    plans: list[TensorPlan]
    config: LoxConfig
    base: Resolved | None
    base_found_in: str


def open_pair(
    aligned: ModelLike,
    base: "ModelLike | HasFactors | None",
    config: LoxConfig | None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    allow_repeat: bool = False,
    stream_in: Path | None = None,
) -> Pair:
    """Open both sides, plan every tensor, and run every check that needs no numbers.

    Args:
        aligned: The aligned model.
        base: The model before alignment, or directions that were found before; None takes what `config` or the aligned
            model's own files name.
        config: Settings; None takes those of a subspace, or the defaults.
        revision: Revision of the aligned model on the Hub.
        token: Hub token.
        trust_remote_code: Run modelling code of the aligned model's repository where "all-linear" needs it.
        allow_repeat: Accept an aligned model that is hardened already.
        stream_in: Read models on the Hub tensor by tensor, with those in work in this folder, unless they are in the
            Hub's cache; None downloads them into the cache.

    Returns:
        The pair.

    Raises:
        ConfigError: If no base is named, or the settings select nothing.
        PairingError: If the two do not fit.
        CheckpointError: If files are missing or damaged.
        UnsupportedModelError: If weights are quantised or offloaded, or the base is spread over processes.
        AlreadyHardenedError: If the aligned model is hardened and `allow_repeat` is not set.
        DistributedError: If processes that hold pieces of the aligned model are given different things.
    """
    with together(aligned):
        if config is None:
            config = base.config if isinstance(base, HasFactors) else LoxConfig()
        files = CHECKPOINT_FILES
        ours = open_side(aligned, "aligned", revision=revision, token=token, files=files, stream_in=stream_in)
        if not allow_repeat:
            check_not_hardened(_stamp(aligned, ours), ours.reference.name_or_path)
        if isinstance(base, HasFactors):
            factors, theirs, found_in = base.factor_source(), None, "subspace"
            _warn_of_another_model(base.report.aligned, ours.reference)
        else:
            base, config, found_in = _named(base, config, aligned, ours, token)
            theirs = open_side(
                base,
                "base",
                revision=config.revision,
                token=token,
                files=BASE_FILES,
                like=aligned,
                stream_in=stream_in,
            )
            if ours.files and theirs.files:
                check_roles(ours.files, theirs.files)
            factors = BaseFactors(theirs.source, config, theirs.reference)
        linear = _linear_modules(aligned, ours, trust_remote_code) if config.target_modules == ALL_LINEAR else ()
        plans = select(ours.source.infos(), config, linear)
        factors.check(ours.source, plans, config)
        given = (config.to_dict(), plans, factors.identity()) if isinstance(ours.source, SpreadSource) else None
    if isinstance(ours.source, SpreadSource):
        check_same(ours.source, given, "settings, or bases of other weights")
    return Pair(ours, factors, plans, config, theirs.files if theirs else None, found_in)


def make_report(pair: Pair, reports: tuple[TensorReport, ...], seconds: float, output: str = "") -> HardeningReport:
    """Put the reports of all matrices together.

    Args:
        pair: What was hardened.
        reports: One report per matrix.
        seconds: Wall time.
        output: Folder that is written; empty for a model in memory.

    Returns:
        The report.

    Raises:
        PairingError: If no matrix differs from the base.
    """
    check_something_changed(reports, pair.aligned.source.label, "the base")
    return HardeningReport(
        aligned=pair.aligned.reference,
        base=pair.factors.reference,
        config=pair.config.to_dict(),
        tensors=reports,
        copied=sum(not plan.edit for plan in pair.plans),
        output=output,
        seconds=seconds,
        versions=versions(),
        warnings=report_warnings(reports, pair.plans),
    )


def open_side(
    model: ModelLike,
    role: str,
    *,
    revision: str | None,
    token: str | bool | None,
    files: list[str],
    like: ModelLike | None = None,
    stream_in: Path | None = None,
) -> Side:
    """Open one model.

    Args:
        model: Id, folder, model or state dict.
        role: "aligned" or "base", for messages.
        revision: Revision on the Hub.
        token: Hub token.
        files: Patterns of the files to download.
        like: The loaded model whose fusing of weights a state dict shares.
        stream_in: See `open_pair`.

    Returns:
        The side.

    Raises:
        ConfigError: If this is nothing that holds a model.
        CheckpointError: If files are missing or damaged.
        UnsupportedModelError: If the weights are not plain tensors.
    """
    if isinstance(model, nn.Module):
        config = getattr(model, "config", None)
        name = getattr(config, "_name_or_path", "") or type(model).__name__
        reference = ModelReference(name, getattr(config, "_commit_hash", None))
        return Side(open_model(model, role, f"{role} '{name}'"), reference)
    if isinstance(model, Mapping):
        if any(map(is_spread, model.values())):
            refuse_base(f"The state dict that is given as {role}")
        tensors = as_checkpoint(like, model) if isinstance(like, nn.Module) else dict(model)
        return Side(DictSource(tensors, f"{role} (a state dict)"), ModelReference("a state dict"))
    if not isinstance(model, (str, Path)):
        raise ConfigError(
            f"The {role} model must be a folder, a Hub id, a loaded model or a state dict, got {type(model).__name__}."
        )
    label = f"{role} '{model}'"
    if stream_in is not None and not Path(model).expanduser().exists() and not is_offline():
        resolved, source = open_remote(model, revision, token, label=label, work_dir=stream_in, files=files)
        check_dense(resolved.folder, label)
        return Side(with_scales(source, resolved.folder), resolved.reference, resolved)
    resolved = resolve(model, revision=revision, token=token, files=files)
    check_dense(resolved.folder, label)
    source = with_scales(CheckpointSource(resolved.folder, label), resolved.folder)
    return Side(source, resolved.reference, resolved)


def _named(
    base: "ModelLike | None", config: LoxConfig, aligned: ModelLike, ours: Side, token: str | bool | None
) -> tuple[ModelLike, LoxConfig, str]:
    """The base that is used, the config that names it, and where it was found."""
    if isinstance(base, (nn.Module, Mapping)):
        return base, config, "base_model"
    if base is not None:
        return base, replace(config, base_model_name_or_path=str(base)), "base_model"
    if config.base_model_name_or_path is not None:
        return config.base_model_name_or_path, config, "config"
    folder = ours.files.folder if ours.files else _card_folder(aligned, ours.reference, token)
    found = named_base(folder) if folder else None
    if found is None:
        raise ConfigError(
            f"No base model is named for {ours.source.label}, and its own files do not name one. "
            "Say which model it was aligned from: base_model_name_or_path (--base-model)."
        )
    name, file = found
    return name, replace(config, base_model_name_or_path=name), file


def _warn_of_another_model(made_from: ModelReference, used_on: ModelReference) -> None:
    """Directions fit any model of the same shapes, so say when the names differ: they may be of another model."""
    if made_from.name_or_path != used_on.name_or_path:
        warnings.warn(
            f"The subspace was made from '{made_from.name_or_path}' and is used on '{used_on.name_or_path}': make "
            "sure that these are the same aligned model.",
            stacklevel=4,
        )


def _card_folder(model: ModelLike, reference: ModelReference, token: str | bool | None) -> Path | None:
    """Folder with the card of a model in memory, where it was loaded from a folder or the Hub."""
    if not getattr(getattr(model, "config", None), "_name_or_path", ""):
        return None
    try:
        return fetch_file(reference.name_or_path, CARD, revision=reference.revision, token=token).parent
    except CheckpointError:
        return None


def _stamp(aligned: ModelLike, side: Side) -> object:
    if side.files is not None:
        return model_config(side.files.folder).get(STAMP)
    return getattr(getattr(aligned, "config", None), STAMP, None)


def _linear_modules(aligned: ModelLike, side: Side, trust_remote_code: bool) -> set[str]:
    if isinstance(aligned, nn.Module):
        return linear_modules(aligned)
    if side.files is None:
        raise ConfigError(
            f"target_modules={ALL_LINEAR!r} needs a model or a checkpoint, a state dict does not know its modules."
        )
    return linear_modules(meta_model(side.files.folder, trust_remote_code=trust_remote_code))
