"""What a folder is: a hardened checkpoint, a LoX adapter, a hardened adapter or a subspace; what it says of itself."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from lox_hf.adapter_files import ADAPTER_WEIGHTS
from lox_hf.config import CONFIG_NAME, LoxConfig
from lox_hf.errors import CheckpointError, ConfigError
from lox_hf.hub_files import CHECKPOINT_FILES
from lox_hf.provenance import STAMP
from lox_hf.records import REPORT_NAME, HardeningReport, ModelReference
from lox_hf.subspace import SUBSPACE_NAME
from lox_hf.weights.folder import CARD, MODEL_CONFIG, is_adapter, model_config, side_files
from lox_hf.weights.source import ADAPTER_CONFIG, INDEX_NAME, read_json, shard_names

CHAT_TEMPLATES = "additional_chat_templates"
Kind = Literal["checkpoint", "adapter", "hardened adapter", "subspace"]


@dataclass(frozen=True)
class Artefact:
    """Something that LoX made, on this machine.

    Attributes:
        folder: Where it lies.
        kind: "checkpoint" (all weights, hardened), "adapter" (LoX as LoRA on the aligned model), "hardened adapter"
            (the alignment is a LoRA adapter, and it is hardened) or "subspace".
        config: The settings.
        aligned: The aligned model.
        base: The model before alignment; None where the alignment is an adapter.
        report: What was done to each matrix; None where a checkpoint was saved without it.
        version: Version of lox_hf that made it; empty where nothing says so.
        carrier: The model that an adapter is put on, as its own config names it; None for the others.
        files: Relative paths of what is published, the card aside.
        left_out: Relative paths of what is not.
    """

    folder: Path
    kind: Kind
    config: LoxConfig
    aligned: ModelReference
    base: ModelReference | None
    report: HardeningReport | None
    version: str = ""
    carrier: ModelReference | None = None
    files: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def open_artefact(folder: str | Path) -> Artefact:
    """Say what a folder is.

    Args:
        folder: The folder.

    Returns:
        What LoX made of it.

    Raises:
        CheckpointError: If LoX made nothing of it, or a file is missing, damaged or of something else.
        ConfigError: If its settings are invalid.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"There is no folder '{folder}' to publish.")
    if (path / SUBSPACE_NAME).is_file():
        return _subspace(path)
    if is_adapter(path):
        return _adapter(path)
    if isinstance(model_config(path).get(STAMP), dict):
        return _checkpoint(path)
    raise CheckpointError(
        f"'{folder}' is nothing that LoX made: no {STAMP} in its {MODEL_CONFIG}, no {SUBSPACE_NAME}, no adapter with "
        f"{CONFIG_NAME}. Harden the model first (lox-hf harden, adapter or subspace), and pass the folder they wrote."
    )


@contextmanager
def saved_artefact(model: Any, tokenizer: Any = None) -> Iterator[Artefact]:
    """Save a model that was hardened in this process into a folder that lives as long as the context.

    Args:
        model: A model that `apply_lox` hardened, or a `PeftModel` of `get_lox_model` or `apply_lox`.
        tokenizer: Its tokenizer, which is saved beside it.

    Yields:
        What the folder is.

    Raises:
        ConfigError: If this is no model that can be saved.
        LoxError: If the model was not hardened in this process.
    """
    from lox_hf.apply import hardening_report
    from lox_hf.lora import is_peft_model

    if not hasattr(model, "save_pretrained"):
        raise ConfigError(f"push_to_hub takes a folder or a model with save_pretrained, got {type(model).__name__}.")
    report = hardening_report(model)
    with tempfile.TemporaryDirectory(prefix="lox-push-") as name:
        folder = Path(name)
        if is_peft_model(model):
            adapter = model.active_adapter
            model.save_pretrained(folder, selected_adapters=[adapter], save_embedding_layers=False)
            folder = folder if adapter == "default" else folder / adapter
        else:
            model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / CONFIG_NAME).write_text(json.dumps(report.config, indent=2) + "\n", encoding="utf-8")
        (folder / REPORT_NAME).write_text(report.to_json(), encoding="utf-8")
        yield open_artefact(folder)


def is_published(name: str) -> bool:
    """Whether a file beside the weights goes to the Hub: what a reader needs, and nothing else that lies there.

    Args:
        name: Relative path; neither weights nor a card.

    Returns:
        True for the small files of a checkpoint.
    """
    here = str(Path(name).parent) in (".", CHAT_TEMPLATES)
    weights_or_card = any(fnmatch(name, pattern) for pattern in ("*.safetensors", CARD))
    return here and not weights_or_card and any(fnmatch(name, pattern) for pattern in CHECKPOINT_FILES)


def read_report(folder: Path) -> HardeningReport | None:
    """Read `lox_report.json` of a folder.

    Args:
        folder: The folder.

    Returns:
        The report; None where there is no such file.

    Raises:
        CheckpointError: If the file is not a report.
    """
    path = folder / REPORT_NAME
    if not path.is_file():
        return None
    try:
        return HardeningReport.from_dict(read_json(path))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not the report of a hardening: {error!r}.") from error


def _checkpoint(folder: Path) -> Artefact:
    stamp = model_config(folder)[STAMP]
    known = {field.name for field in fields(LoxConfig)}
    config = LoxConfig.from_dict({name: value for name, value in stamp.items() if name in known})
    report = read_report(folder)
    revision = stamp.get("aligned_revision")
    aligned = ModelReference(str(stamp.get("aligned_model_name_or_path")), str(revision) if revision else None)
    base = ModelReference(config.base_model_name_or_path, config.revision) if config.base_model_name_or_path else None
    if report is not None:
        _check_report(folder, report, config, aligned)
    weights = shard_names(folder, f"'{folder}'")
    index = [INDEX_NAME] if (folder / INDEX_NAME).is_file() and "model.safetensors" not in weights else []
    files, left_out = _side_files(folder)
    return Artefact(
        folder,
        "checkpoint",
        config,
        aligned,
        base if report is None else report.base or base,
        report,
        str(stamp.get("lox_version") or ""),
        files=(*weights, *index, MODEL_CONFIG, *files),
        left_out=tuple(name for name in left_out if name not in weights),
    )


def _adapter(folder: Path) -> Artefact:
    missing = [name for name in (CONFIG_NAME, REPORT_NAME, ADAPTER_WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"The adapter '{folder}' lacks {', '.join(missing)}, so nothing says what it is. Make it with lox-hf "
            "adapter or lox-hf harden, or pass the PeftModel itself to lox_hf.push_to_hub, which writes them."
        )
    config, report = LoxConfig.from_pretrained(folder), _report(folder)
    named = read_json(folder / ADAPTER_CONFIG)
    carrier = ModelReference(str(named.get("base_model_name_or_path") or ""), named.get("revision"))
    files, left_out = _side_files(folder)
    is_alignment = report.base is None and all(item.method == "lora" for item in report.tensors)
    return Artefact(
        folder,
        "hardened adapter" if is_alignment else "adapter",
        config,
        report.aligned,
        report.base,
        report,
        report.versions.get("lox_hf", ""),
        carrier,
        files=(ADAPTER_WEIGHTS, *files),
        left_out=tuple(name for name in left_out if name != ADAPTER_WEIGHTS),
    )


def _subspace(folder: Path) -> Artefact:
    report, files = _report(folder), (SUBSPACE_NAME, CONFIG_NAME, REPORT_NAME)
    config = LoxConfig.from_pretrained(folder)
    others = tuple(sorted(path.name for path in folder.iterdir() if path.name not in files))
    version = report.versions.get("lox_hf", "")
    return Artefact(
        folder, "subspace", config, report.aligned, report.base, report, version, files=files, left_out=others
    )


def _report(folder: Path) -> HardeningReport:
    report = read_report(folder)
    if report is None:
        raise CheckpointError(f"'{folder}' has no {REPORT_NAME}: make it anew, or copy it from where it was made.")
    return report


def _check_report(folder: Path, report: HardeningReport, config: LoxConfig, aligned: ModelReference) -> None:
    """A report that was left beside other weights would put wrong figures on the card."""
    ours, theirs = ({name: found.get(name) for name in ("r", "alpha")} for found in (config.to_dict(), report.config))
    if ours != theirs or report.aligned.name_or_path != aligned.name_or_path:
        raise CheckpointError(
            f"{folder / REPORT_NAME} is of another hardening than the weights: it says {theirs} of "
            f"'{report.aligned.name_or_path}', {MODEL_CONFIG} says {ours} of '{aligned.name_or_path}'. Remove it, or "
            "harden again."
        )


def _side_files(folder: Path) -> tuple[list[str], list[str]]:
    """What a reader needs beside the weights, and what stays here: other weights, cards, whatever else lies there."""
    copied, left_out = side_files(folder)
    names = [str(path) for path in copied]
    published = [name for name in names if is_published(name)]
    return published, [*(name for name in names if name not in published), *map(str, left_out)]
