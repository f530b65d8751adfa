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
    "AutoConfig",
    "AutoReport",
    "CheckpointError",
    "ClassifierJudge",
    "ConfigError",
    "ControlTraining",
    "DistributedError",
    "DivergenceReport",
    "DriftReading",
    "Endpoint",
    "EndpointError",
    "HardeningPlan",
    "HardeningReport",
    "JudgeAgreement",
    "Landscape",
    "LayerMap",
    "Limit",
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
    "PushReport",
    "RankCurve",
    "Rate",
    "RefusalJudge",
    "RubricJudge",
    "SafetyComparison",
    "SafetyProbe",
    "SafetyReport",
    "SafetySubspace",
    "Score",
    "Selection",
    "StressConfig",
    "StressPlan",
    "StressReport",
    "TensorPlan",
    "TensorReport",
    "TrainingReading",
    "UnsupportedModelError",
    "Verdict",
    "VerificationReport",
    "__version__",
    "agreement",
    "answer_reference",
    "apply_lox",
    "attack_success_rate",
    "auto_harden",
    "compare",
    "divergence",
    "evaluate_safety",
    "extract_lox_adapter",
    "get_attack",
    "get_lox_model",
    "gsm8k_accuracy",
    "harden_checkpoint",
    "harden_to_hub",
    "hardening_report",
    "join_ranks",
    "landscape",
    "layer_map",
    "load_metric",
    "load_prompts",
    "load_report",
    "perplexity",
    "plan_hardening",
    "plan_stress",
    "plan_to_hub",
    "push_to_hub",
    "rank_curve",
    "read_drift",
    "revert_lox",
    "select",
    "stress_test",
    "verify",
]

_HOMES = {
    "adapter": (
        "extract_lox_adapter",
        "get_lox_model",
    ),
    "analysis.landscape": ("landscape",),
    "analysis.layers": ("layer_map",),
    "analysis.rank_curve": ("rank_curve",),
    "analysis.select": ("select",),
    "auto.run": ("auto_harden",),
    "auto.settings": ("AutoConfig",),
    "evaluation.divergence": ("answer_reference", "divergence"),
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
        "DistributedError",
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
    "hub.push": ("push_to_hub",),
    "hub.reports": ("load_report",),
    "hub.stream": (
        "harden_to_hub",
        "plan_to_hub",
    ),
    "hub.verify": ("verify",),
    "metrics": ("load_metric",),
    "records": (
        "AccuracyReport",
        "AutoReport",
        "DivergenceReport",
        "DriftReading",
        "HardeningPlan",
        "HardeningReport",
        "JudgeAgreement",
        "Landscape",
        "LayerMap",
        "Limit",
        "ModelReference",
        "PairedDifference",
        "PerplexityReport",
        "ProbeReading",
        "PushReport",
        "RankCurve",
        "Rate",
        "SafetyComparison",
        "SafetyReport",
        "Score",
        "Selection",
        "StressPlan",
        "StressReport",
        "TensorPlan",
        "TensorReport",
        "TrainingReading",
        "Verdict",
        "VerificationReport",
    ),
    "parallel.ranks": ("join_ranks",),
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
    from lox_hf.analysis.landscape import landscape
    from lox_hf.analysis.layers import layer_map
    from lox_hf.analysis.rank_curve import rank_curve
    from lox_hf.analysis.select import select
    from lox_hf.apply import apply_lox, hardening_report, revert_lox
    from lox_hf.auto.run import auto_harden
    from lox_hf.auto.settings import AutoConfig
    from lox_hf.config import LoxConfig
    from lox_hf.errors import (
        AlreadyHardenedError,
        CheckpointError,
        ConfigError,
        DistributedError,
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
    from lox_hf.evaluation.divergence import answer_reference, divergence
    from lox_hf.evaluation.judges.classifier import ClassifierJudge
    from lox_hf.evaluation.judges.refusal import RefusalJudge
    from lox_hf.evaluation.judges.rubric import RubricJudge
    from lox_hf.evaluation.models.endpoint import Endpoint
    from lox_hf.evaluation.safety import evaluate_safety
    from lox_hf.evaluation.utility import gsm8k_accuracy, perplexity
    from lox_hf.harden import harden_checkpoint, plan_hardening
    from lox_hf.hub.push import push_to_hub
    from lox_hf.hub.reports import load_report
    from lox_hf.hub.stream import harden_to_hub, plan_to_hub
    from lox_hf.hub.verify import verify
    from lox_hf.metrics import load_metric
    from lox_hf.parallel.ranks import join_ranks
    from lox_hf.records import (
        AccuracyReport,
        AutoReport,
        DivergenceReport,
        DriftReading,
        HardeningPlan,
        HardeningReport,
        JudgeAgreement,
        Landscape,
        LayerMap,
        Limit,
        ModelReference,
        PairedDifference,
        PerplexityReport,
        ProbeReading,
        PushReport,
        RankCurve,
        Rate,
        SafetyComparison,
        SafetyReport,
        Score,
        Selection,
        StressPlan,
        StressReport,
        TensorPlan,
        TensorReport,
        TrainingReading,
        Verdict,
        VerificationReport,
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
