"""Harden safety-aligned language models against losing their safety in fine-tuning, by Low-Rank Extrapolation (LoX).

Everything is loaded on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lox_hf.version import __version__

_HOMES = {
    "LoxConfig": "config",
    "apply_lox": "apply",
    "revert_lox": "apply",
    "hardening_report": "apply",
    "get_lox_model": "adapter",
    "extract_lox_adapter": "adapter",
    "harden_checkpoint": "harden",
    "plan_hardening": "harden",
    "SafetySubspace": "subspace",
    "HardeningPlan": "records",
    "HardeningReport": "records",
    "ModelReference": "records",
    "TensorPlan": "records",
    "TensorReport": "records",
    "LoxError": "errors",
    "AlreadyHardenedError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "NumericsError": "errors",
    "OutputError": "errors",
    "PairingError": "errors",
    "UnsupportedModelError": "errors",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from lox_hf.adapter import extract_lox_adapter, get_lox_model
    from lox_hf.apply import apply_lox, hardening_report, revert_lox
    from lox_hf.config import LoxConfig
    from lox_hf.errors import (
        AlreadyHardenedError,
        CheckpointError,
        ConfigError,
        LoxError,
        NumericsError,
        OutputError,
        PairingError,
        UnsupportedModelError,
    )
    from lox_hf.harden import harden_checkpoint, plan_hardening
    from lox_hf.records import HardeningPlan, HardeningReport, ModelReference, TensorPlan, TensorReport
    from lox_hf.subspace import SafetySubspace


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lox_hf' has no attribute '{name}'")
    value = getattr(import_module(f"lox_hf.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
