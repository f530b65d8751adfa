"""Frozen results of every stage, to and from JSON. The command line, cards and logs only read them."""

from lox_hf.records.auto import AutoModel, AutoPlan, AutoReport, Choice
from lox_hf.records.base import JsonRecord, ModelReference
from lox_hf.records.comparison import JudgeAgreement, PairedDifference, SafetyComparison, SafetyRun
from lox_hf.records.drift import DriftReading, ProbeReading, TensorDrift, TrainingReading
from lox_hf.records.hardening import (
    FROM_CONFIG,
    REPORT_NAME,
    HardeningEstimate,
    HardeningPlan,
    HardeningReport,
    TensorPlan,
    TensorReport,
)
from lox_hf.records.landscape import Basin, GridPoint, Landscape, PlacedModel
from lox_hf.records.layers import LayerEntry, LayerMap, LayerSummary
from lox_hf.records.publishing import PushedFile, PushReport, TensorCheck, VerificationReport
from lox_hf.records.rank_curve import CurvePoint, EffectiveRank, RankCurve
from lox_hf.records.safety import CategoryRates, Outcome, Rate, RubricScores, SafetyReport, Verdict
from lox_hf.records.score import Score
from lox_hf.records.selection import Candidate, DivergenceReport, Limit, Selection
from lox_hf.records.stress import CellResult, StepReading, TaskScore, UtilityScore
from lox_hf.records.stress_plan import AttackPlan, StressPlan
from lox_hf.records.stress_report import (
    AttackOutcome,
    ModelBefore,
    SeedDifference,
    Spread,
    StressReport,
    WorstCase,
)
from lox_hf.records.utility import AccuracyReport, PerplexityReport

__all__ = [
    "FROM_CONFIG",
    "REPORT_NAME",
    "AccuracyReport",
    "AttackOutcome",
    "AttackPlan",
    "AutoModel",
    "AutoPlan",
    "AutoReport",
    "Basin",
    "Candidate",
    "CategoryRates",
    "CellResult",
    "Choice",
    "CurvePoint",
    "DivergenceReport",
    "DriftReading",
    "EffectiveRank",
    "GridPoint",
    "HardeningEstimate",
    "HardeningPlan",
    "HardeningReport",
    "JsonRecord",
    "JudgeAgreement",
    "Landscape",
    "LayerEntry",
    "LayerMap",
    "LayerSummary",
    "Limit",
    "ModelBefore",
    "ModelReference",
    "Outcome",
    "PairedDifference",
    "PerplexityReport",
    "PlacedModel",
    "ProbeReading",
    "PushReport",
    "PushedFile",
    "RankCurve",
    "Rate",
    "RubricScores",
    "SafetyComparison",
    "SafetyReport",
    "SafetyRun",
    "Score",
    "SeedDifference",
    "Selection",
    "Spread",
    "StepReading",
    "StressPlan",
    "StressReport",
    "TaskScore",
    "TensorCheck",
    "TensorDrift",
    "TensorPlan",
    "TensorReport",
    "TrainingReading",
    "UtilityScore",
    "Verdict",
    "VerificationReport",
    "WorstCase",
]
