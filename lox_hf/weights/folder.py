"""What the side files of a checkpoint folder say: architecture, quantisation, base model, provenance."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lox_hf.errors import CheckpointError, ConfigError, PairingError, UnsupportedModelError, listing
from lox_hf.hub_files import Resolved
from lox_hf.provenance import STAMP
from lox_hf.weights.source import ADAPTER_CONFIG, INDEX_NAME, WEIGHTS_NAME, read_json

MODEL_CONFIG = "config.json"
CARD = "README.md"
WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".tflite",
    ".ot",
)


def is_adapter(folder: Path) -> bool:
    """Whether the folder is a PEFT adapter and not a full checkpoint; trainers put a `config.json` beside both."""
    return (folder / ADAPTER_CONFIG).is_file() and not any(
        (folder / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME)
    )


def model_config(folder: Path) -> dict[str, Any]:
    """Content of `config.json`; empty where there is none.

    Args:
        folder: Checkpoint folder.

    Returns:
        The config as a dict.

    Raises:
        CheckpointError: If the file is not JSON.
    """
    return read_json(folder / MODEL_CONFIG) if (folder / MODEL_CONFIG).is_file() else {}


def named_base(folder: Path) -> tuple[str, str] | None:
    """Find the base a model's own files name: an adapter's config first, then the card's `base_model`.

    Args:
        folder: Checkpoint or adapter folder.

    Returns:
        The base's name and the file that names it; None where no file does.

    Raises:
        ConfigError: If the card names several bases.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        name = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        if isinstance(name, str) and name:
            return name, ADAPTER_CONFIG
    named = card_metadata(folder).get("base_model")
    names = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    if len(names) > 1:
        raise ConfigError(
            f"The card of {folder} names several bases, {names}: say which one with base_model_name_or_path."
        )
    return (str(names[0]), CARD) if names else None


def card_metadata(folder: Path) -> dict[str, Any]:
    """YAML front matter of the card; empty where there is none or it is not a mapping.

    Args:
        folder: Folder with the card.

    Returns:
        The metadata as the file has it.

    Raises:
        CheckpointError: If it is not YAML.
    """
    path = folder / CARD
    if not path.is_file():
        return {}
    found = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        data = yaml.safe_load(found.group(1)) if found else {}
    except yaml.YAMLError as error:
        raise CheckpointError(
            f"The metadata of {path} is not YAML: {listing([str(error).splitlines()[0]])}"
        ) from error
    return data if isinstance(data, dict) else {}


def named_relation(folder: Path) -> str:
    """Return what the card says a model is to its base: its `base_model_relation`; empty where it does not say."""
    return str(card_metadata(folder).get("base_model_relation") or "")


def quantisation(folder: Path) -> dict[str, Any]:
    """What `config.json` says of quantisation; empty where the checkpoint is not quantised.

    Args:
        folder: Checkpoint folder.

    Returns:
        The `quantization_config`.

    Raises:
        CheckpointError: If the file is not JSON.
    """
    found = model_config(folder).get("quantization_config") or {}
    return found if isinstance(found, dict) else {"quant_method": str(found)}


def check_dense(folder: Path, label: str) -> None:
    """Refuse a quantised checkpoint, by the name of its scheme, unless its weights are float8 with scales.

    Args:
        folder: Checkpoint folder.
        label: How messages call it.

    Raises:
        UnsupportedModelError: If its stored numbers are codes.
    """
    scheme = quantisation(folder)
    if scheme and not _is_float8(scheme):
        words = (
            scheme.get("quant_method", "unknown scheme"),
            scheme.get("format"),
            scheme.get("expert_dtype"),
            "asymmetric" if any(each.get("symmetric") is False for each in group_weights(scheme)) else None,
        )
        raise UnsupportedModelError(
            f"{label} is quantised ({' '.join(str(word) for word in words if word)}); its stored numbers are codes, "
            "not weights. Harden the full-precision checkpoint and quantise the result, or put the LoX adapter on the "
            "quantised model with get_lox_model."
        )


def check_roles(aligned: Resolved, base: Resolved) -> None:
    """Refuse pairs that are the wrong way round, of different architectures, or one folder twice.

    Args:
        aligned: The aligned model.
        base: The model before alignment.

    Raises:
        PairingError: If the files show that the two do not fit.
    """
    if aligned.folder.resolve() == base.folder.resolve():
        raise PairingError(f"Aligned and base are the same checkpoint, {aligned.folder}: nothing to extrapolate.")
    if STAMP in model_config(base.folder):
        raise PairingError(f"The base '{base.reference.name_or_path}' is itself hardened by LoX: are the two swapped?")
    back = card_metadata(base.folder).get("base_model")
    names = back if isinstance(back, list) else [back]
    if any(_same_model(name, aligned) for name in names if name):
        raise PairingError(
            f"Aligned and base are swapped: the card of '{base.reference.name_or_path}' says that it was made from "
            f"'{aligned.reference.name_or_path}'."
        )
    ours, theirs = (model_config(side.folder).get("model_type") for side in (aligned, base))
    if ours and theirs and ours != theirs:
        raise PairingError(f"Cannot pair architectures: aligned is '{ours}', base is '{theirs}'.")


def side_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Split the files that are not the checkpoint's own weights: to be copied, and left out as stale weights.

    Args:
        folder: Checkpoint folder.

    Returns:
        Relative paths to copy, and relative paths that hold weights in another form, or the card of the aligned model.
    """
    copied, left_out = [], []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        if relative.name in (INDEX_NAME, MODEL_CONFIG) and len(relative.parts) == 1:
            continue
        stale = relative.suffix in WEIGHT_SUFFIXES or relative.name == CARD or relative.name.endswith(".index.json")
        (left_out if stale else copied).append(relative)
    return copied, left_out


def _same_model(name: str, model: Resolved) -> bool:
    if name == model.reference.name_or_path:
        return True
    path = Path(name).expanduser()
    return path.is_dir() and path.resolve() == model.folder.resolve()


def _is_float8(scheme: dict[str, Any]) -> bool:
    """Whether every quantised weight is float8 with scales: FineGrainedFP8, or compressed-tensors' float-quantized."""
    if scheme.get("quant_method") == "fp8":
        return scheme.get("expert_dtype", "fp8") == "fp8"
    if scheme.get("quant_method") != "compressed-tensors" or scheme.get("format") != "float-quantized":
        return False
    weights = group_weights(scheme)
    is_rotated = bool(scheme.get("transform_config"))
    is_sparse = (scheme.get("sparsity_config") or {}).get("format", "dense") != "dense"
    eight_bits = all(each.get("type") == "float" and each.get("num_bits") == 8 for each in weights)
    symmetric = all(each.get("symmetric") is not False for each in weights)
    return bool(weights) and eight_bits and symmetric and not is_rotated and not is_sparse


def group_weights(scheme: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return how compressed-tensors stores the weights of each group; empty of another scheme.

    Args:
        scheme: The `quantization_config`.

    Returns:
        The settings, a dict for each group.
    """
    return [(group or {}).get("weights") or {} for group in (scheme.get("config_groups") or {}).values()]
