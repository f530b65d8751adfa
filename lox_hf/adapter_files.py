"""A PEFT LoRA adapter on disk: hardened without a base model."""

import json
import math
import time
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lox_hf.config import CONFIG_NAME, LoxConfig
from lox_hf.errors import CheckpointError, UnsupportedModelError
from lox_hf.hub_files import Resolved
from lox_hf.lora import LoraPair, check_plain_lora, harden_pairs, lora_report, plan_pairs
from lox_hf.provenance import check_not_hardened
from lox_hf.records import REPORT_NAME, HardeningPlan, HardeningReport
from lox_hf.weights.folder import MODEL_CONFIG, side_files
from lox_hf.weights.selection import get_pattern_value
from lox_hf.weights.source import ADAPTER_CONFIG, read_json
from lox_hf.weights.writer import FolderWriter

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTORS = ((".lora_B.weight", ".lora_A.weight"), (".lora_embedding_B", ".lora_embedding_A"))


def harden_adapter(
    adapter: Resolved, output_dir: str | Path, config: LoxConfig, *, allow_repeat: bool = False
) -> HardeningReport:
    """Harden a LoRA adapter folder: dW = scaling * B A becomes U (S + alpha S_k) V^T, in the adapter's own rank.

    Args:
        adapter: The adapter's folder.
        output_dir: Folder to create; it must not exist, or be empty.
        config: Settings; the base in it is not used.
        allow_repeat: Harden an adapter that is hardened already once more.

    Returns:
        What was done to each module.

    Raises:
        CheckpointError: If files are missing or damaged.
        UnsupportedModelError: If the adapter is not plain LoRA.
        PairingError: If every B A is zero.
        ConfigError: If the settings select nothing.
        NumericsError: If factors contain NaN or Inf.
        OutputError: If the output exists, is an input, or cannot be written.
        AlreadyHardenedError: If the adapter is hardened and `allow_repeat` is not set.
    """
    started = time.perf_counter()
    tensors, pairs = _open(adapter, allow_repeat)
    writer = FolderWriter(output_dir)
    writer.check(sum(tensor.nbytes for tensor in tensors.values()), [adapter.folder])
    reports = harden_pairs(pairs, config, adapter.reference.name_or_path)  # this process's own copies of the file
    others = len(tensors) - 2 * len(pairs)
    report = lora_report(adapter.reference, config, reports, pairs, started, output=str(output_dir), others=others)
    _publish(adapter, tensors, report, writer)
    return report


def plan_adapter(
    adapter: Resolved, config: LoxConfig, *, output_dir: str | Path | None = None, allow_repeat: bool = False
) -> HardeningPlan:
    """Plan `harden_adapter` without writing anything.

    Args:
        adapter: The adapter's folder.
        config: Settings.
        output_dir: Where the output would go; checked when given.
        allow_repeat: Accept an adapter that is hardened already.

    Returns:
        What would be done to the change B A of every module.

    Raises:
        LoxError: As `harden_adapter` would.
    """
    tensors, pairs = _open(adapter, allow_repeat)
    plans = plan_pairs(pairs, config)
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    if output_dir is not None:
        FolderWriter(output_dir).check(total_bytes, [adapter.folder])
    copied, left_out = side_files(adapter.folder)
    return HardeningPlan(
        aligned=adapter.reference,
        base=None,
        base_found_in=ADAPTER_CONFIG,
        tensors=tuple(plans),
        total_bytes=total_bytes,
        files=tuple(str(path) for path in copied),
        left_out=tuple(str(path) for path in left_out if str(path) != ADAPTER_WEIGHTS),
    )


def adapter_scaling(adapter_config: dict, module: str) -> float:
    """PEFT's scaling of one module: lora_alpha / r, or lora_alpha / sqrt(r) with rank-stabilised LoRA.

    Args:
        adapter_config: Content of `adapter_config.json`.
        module: Name of the module.

    Returns:
        The scaling.
    """
    r = get_pattern_value(adapter_config.get("rank_pattern"), module, adapter_config["r"])
    alpha = get_pattern_value(adapter_config.get("alpha_pattern"), module, adapter_config["lora_alpha"])
    return alpha / math.sqrt(r) if adapter_config.get("use_rslora") else alpha / r


def _open(adapter: Resolved, allow_repeat: bool) -> tuple[dict[str, Tensor], list[LoraPair]]:
    name = adapter.reference.name_or_path
    adapter_config = read_json(adapter.folder / ADAPTER_CONFIG)
    check_plain_lora(adapter_config, f"'{name}'")
    missing = [key for key in ("r", "lora_alpha") if not _is_positive(adapter_config.get(key), key)]
    if missing:
        raise CheckpointError(f"The {ADAPTER_CONFIG} of '{name}' does not say {' and '.join(missing)}.")
    if not allow_repeat and (adapter.folder / CONFIG_NAME).is_file():
        check_not_hardened(read_json(adapter.folder / CONFIG_NAME), name)
    tensors = _load(adapter.folder / ADAPTER_WEIGHTS)
    return tensors, _pairs(tensors, adapter_config)


def _is_positive(value: object, key: str) -> bool:
    return isinstance(value, (int, float)) and (value > 0 or key == "lora_alpha")


def _load(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"There is no {path}: only adapters saved as safetensors are read.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"Cannot read {path}: {error}. The file is truncated or not safetensors.") from error


def _pairs(tensors: dict[str, Tensor], adapter_config: dict) -> list[LoraPair]:
    pairs = []
    for key_b in tensors:
        for suffix_b, suffix_a in FACTORS:
            key_a = key_b.removesuffix(suffix_b) + suffix_a
            if key_b.endswith(suffix_b) and key_a in tensors:
                module = key_b.removesuffix(suffix_b).removeprefix(PREFIX)
                b, a = tensors[key_b], tensors[key_a]
                if b.dim() != 2:
                    raise UnsupportedModelError(f"{module} is a convolution under LoRA, which is not supported.")
                pairs.append(LoraPair(module, b, a, adapter_scaling(adapter_config, module)))
    if not pairs:
        raise CheckpointError("The adapter holds no LoRA factors.")
    return pairs


def _publish(adapter: Resolved, tensors: dict[str, Tensor], report: HardeningReport, writer: FolderWriter) -> None:
    weights = save(tensors, metadata={"format": "pt"})
    with writer:
        for path in side_files(adapter.folder)[0]:
            if str(path) not in (CONFIG_NAME, REPORT_NAME):
                writer.copy(adapter.folder / path, str(path))
        if (adapter.folder / MODEL_CONFIG).is_file():
            writer.copy(adapter.folder / MODEL_CONFIG, MODEL_CONFIG)
        writer.write(ADAPTER_WEIGHTS, weights)
        writer.write(CONFIG_NAME, (json.dumps(report.config, indent=2) + "\n").encode())
        writer.write(REPORT_NAME, report.to_json().encode())
        writer.publish()
