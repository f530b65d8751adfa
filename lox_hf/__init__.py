"""Harden safety-aligned language models against losing their safety in fine-tuning, by Low-Rank Extrapolation (LoX).

Everything is loaded on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lox_hf.version import __version__

__all__ = [
    "AlreadyHardenedError",
    "CheckpointError",
    "ConfigError",
    "HardeningPlan",
    "HardeningReport",
    "LoxConfig",
    "LoxError",
    "ModelReference",
    "NumericsError",
    "OutputError",
    "PairingError",
    "SafetySubspace",
    "TensorPlan",
    "TensorReport",
    "UnsupportedModelError",
    "__version__",
    "apply_lox",
    "extract_lox_adapter",
    "get_lox_model",
    "harden_checkpoint",
    "hardening_report",
    "plan_hardening",
    "revert_lox",
]

_HOMES = {
    "adapter": ("extract_lox_adapter", "get_lox_model"),
    "apply": ("apply_lox", "hardening_report", "revert_lox"),
    "config": ("LoxConfig",),
    "errors": (
        "AlreadyHardenedError",
        "CheckpointError",
        "ConfigError",
        "LoxError",
        "NumericsError",
        "OutputError",
        "PairingError",
        "UnsupportedModelError",
    ),
    "harden": ("harden_checkpoint", "plan_hardening"),
    "records": ("HardeningPlan", "HardeningReport", "ModelReference", "TensorPlan", "TensorReport"),
    "subspace": ("SafetySubspace",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

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
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lox_hf' has no attribute '{name}'")
    value = getattr(import_module(f"lox_hf.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
