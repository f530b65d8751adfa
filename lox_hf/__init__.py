"""Harden safety-aligned language models against losing their safety in fine-tuning, by Low-Rank Extrapolation (LoX).

Everything is loaded on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lox_hf.version import __version__

__all__ = [
    "AccuracyReport",
    "AlreadyHardenedError",
    "Attack",
    "CheckpointError",
    "ClassifierJudge",
    "ConfigError",
    "ControlTraining",
    "DriftReading",
    "Endpoint",
    "EndpointError",
    "HardeningPlan",
    "HardeningReport",
    "JudgeAgreement",
    "LoxCallback",
    "LoxConfig",
    "LoxError",
    "ModelReference",
    "NumericsError",
    "OutputError",
    "PairedDifference",
    "PairingError",
    "PerplexityReport",
    "ProbeReading",
    "Prompt",
    "PromptError",
    "Rate",
    "RefusalJudge",
    "RubricJudge",
    "SafetyComparison",
    "SafetyProbe",
    "SafetyReport",
    "SafetySubspace",
    "StressConfig",
    "StressPlan",
    "StressReport",
    "TensorPlan",
    "TensorReport",
    "TrainingReading",
    "UnsupportedModelError",
    "Verdict",
    "__version__",
    "agreement",
    "apply_lox",
    "attack_success_rate",
    "compare",
    "evaluate_safety",
    "extract_lox_adapter",
    "get_attack",
    "get_lox_model",
    "gsm8k_accuracy",
    "harden_checkpoint",
    "hardening_report",
    "load_metric",
    "load_prompts",
    "perplexity",
    "plan_hardening",
    "plan_stress",
    "read_drift",
    "revert_lox",
    "stress_test",
]

_HOMES = {
    "adapter": (
        "extract_lox_adapter",
        "get_lox_model",
    ),
    "apply": (
        "apply_lox",
        "hardening_report",
        "revert_lox",
    ),
    "config": ("LoxConfig",),
    "errors": (
        "AlreadyHardenedError",
        "CheckpointError",
        "ConfigError",
        "EndpointError",
        "LoxError",
        "NumericsError",
        "OutputError",
        "PairingError",
        "PromptError",
        "UnsupportedModelError",
    ),
    "evaluation.asr": ("attack_success_rate",),
    "evaluation.comparison": (
        "agreement",
        "compare",
    ),
    "evaluation.models.endpoint": ("Endpoint",),
    "evaluation.judges.classifier": ("ClassifierJudge",),
    "evaluation.judges.refusal": ("RefusalJudge",),
    "evaluation.judges.rubric": ("RubricJudge",),
    "evaluation.data.prompts": (
        "Prompt",
        "load_prompts",
    ),
    "evaluation.safety": ("evaluate_safety",),
    "evaluation.utility": (
        "gsm8k_accuracy",
        "perplexity",
    ),
    "harden": (
        "harden_checkpoint",
        "plan_hardening",
    ),
    "metrics": ("load_metric",),
    "records": (
        "AccuracyReport",
        "DriftReading",
        "HardeningPlan",
        "HardeningReport",
        "JudgeAgreement",
        "ModelReference",
        "PairedDifference",
        "PerplexityReport",
        "ProbeReading",
        "Rate",
        "SafetyComparison",
        "SafetyReport",
        "StressPlan",
        "StressReport",
        "TensorPlan",
        "TensorReport",
        "TrainingReading",
        "Verdict",
    ),
    "robustness.attacks.recipe": ("Attack",),
    "robustness.attacks.rows": ("get_attack",),
    "robustness.controls": ("ControlTraining",),
    "robustness.plan": ("plan_stress",),
    "robustness.settings": ("StressConfig",),
    "robustness.stress": ("stress_test",),
    "subspace": ("SafetySubspace",),
    "training.callback": ("LoxCallback",),
    "training.monitor": ("read_drift",),
    "training.probe": ("SafetyProbe",),
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
        EndpointError,
        LoxError,
        NumericsError,
        OutputError,
        PairingError,
        PromptError,
        UnsupportedModelError,
    )
    from lox_hf.evaluation.asr import attack_success_rate
    from lox_hf.evaluation.comparison import agreement, compare
    from lox_hf.evaluation.data.prompts import Prompt, load_prompts
    from lox_hf.evaluation.judges.classifier import ClassifierJudge
    from lox_hf.evaluation.judges.refusal import RefusalJudge
    from lox_hf.evaluation.judges.rubric import RubricJudge
    from lox_hf.evaluation.models.endpoint import Endpoint
    from lox_hf.evaluation.safety import evaluate_safety
    from lox_hf.evaluation.utility import gsm8k_accuracy, perplexity
    from lox_hf.harden import harden_checkpoint, plan_hardening
    from lox_hf.metrics import load_metric
    from lox_hf.records import (
        AccuracyReport,
        DriftReading,
        HardeningPlan,
        HardeningReport,
        JudgeAgreement,
        ModelReference,
        PairedDifference,
        PerplexityReport,
        ProbeReading,
        Rate,
        SafetyComparison,
        SafetyReport,
        StressPlan,
        StressReport,
        TensorPlan,
        TensorReport,
        TrainingReading,
        Verdict,
    )
    from lox_hf.robustness.attacks.recipe import Attack
    from lox_hf.robustness.attacks.rows import get_attack
    from lox_hf.robustness.controls import ControlTraining
    from lox_hf.robustness.plan import plan_stress
    from lox_hf.robustness.settings import StressConfig
    from lox_hf.robustness.stress import stress_test
    from lox_hf.subspace import SafetySubspace
    from lox_hf.training.callback import LoxCallback
    from lox_hf.training.monitor import read_drift
    from lox_hf.training.probe import SafetyProbe


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lox_hf' has no attribute '{name}'")
    value = getattr(import_module(f"lox_hf.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
