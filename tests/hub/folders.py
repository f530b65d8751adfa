"""Folders that look like what LoX writes, without any weights: what cards and evidence are made of."""

import json
import math
from pathlib import Path
from typing import Any

from lox_hf import LoxConfig
from lox_hf.provenance import stamp
from lox_hf.records import HardeningReport, ModelReference, TensorReport

ALIGNED = ModelReference("org/aligned", "a" * 40)
BASE = ModelReference("org/base", "b" * 40)
NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj", "lm_head")


def make_report(config: LoxConfig, aligned: ModelReference = ALIGNED, base: ModelReference | None = BASE) -> Any:
    """Make a report of four matrices, of which alignment did not change the last."""
    shares = (0.25, 0.75, 0.5, math.nan)
    method = "lanczos" if base else "lora"
    tensors = tuple(
        TensorReport(f"{name}.weight", (8, 8), "bfloat16", config.alpha, rank, method, share, float(rank > 0))
        for name, share in zip(NAMES, shares, strict=True)
        for rank in [0 if math.isnan(share) else 2]
    )
    return HardeningReport(aligned, base, config.to_dict(), tensors, copied=3, versions={"lox_hf": "0.1.0"})


def write_checkpoint(
    folder: Path,
    config: LoxConfig | None = None,
    aligned: ModelReference = ALIGNED,
    base: ModelReference | None = BASE,
    *,
    with_report: bool = True,
) -> Path:
    """Write a hardened checkpoint."""
    config = config or LoxConfig(base.name_or_path if base else None, revision=base.revision if base else None, r=2)
    folder.mkdir(parents=True)
    stamped = {"architectures": ["LlamaForCausalLM"], "lox_config": stamp(config, aligned, base)}
    (folder / "config.json").write_text(json.dumps(stamped))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    if with_report:
        (folder / "lox_report.json").write_text(make_report(config, aligned, base).to_json())
    return folder


def write_adapter(folder: Path, *, base: ModelReference | None = BASE, carrier: str = "org/aligned") -> Path:
    """Write an adapter: LoX itself, or without a base an alignment that is one."""
    folder.mkdir(parents=True)
    named = {"base_model_name_or_path": carrier, "revision": "c" * 40, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(named))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    _write_records(folder, base)
    return folder


def write_subspace(folder: Path) -> Path:
    """Write a subspace."""
    folder.mkdir(parents=True)
    (folder / "lox_subspace.safetensors").write_bytes(b"weights")
    _write_records(folder, BASE)
    return folder


def _write_records(folder: Path, base: ModelReference | None) -> None:
    config = LoxConfig("org/base", r=2)
    (folder / "lox_config.json").write_text(config.to_json())
    (folder / "lox_report.json").write_text(make_report(config, base=base).to_json())
