"""Frozen results of every stage, to and from JSON. The command line, cards and logs only read them."""

from lox_hf.records.base import JsonRecord, ModelReference
from lox_hf.records.comparison import JudgeAgreement, PairedDifference, SafetyComparison, SafetyRun
from lox_hf.records.drift import DriftReading, ProbeReading, TensorDrift, TrainingReading
from lox_hf.records.hardening import REPORT_NAME, HardeningPlan, HardeningReport, TensorPlan, TensorReport
from lox_hf.records.safety import CategoryRates, Outcome, Rate, RubricScores, SafetyReport, Verdict
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
    "REPORT_NAME",
    "AccuracyReport",
    "AttackOutcome",
    "AttackPlan",
    "CategoryRates",
    "CellResult",
    "DriftReading",
    "HardeningPlan",
    "HardeningReport",
    "JsonRecord",
    "JudgeAgreement",
    "ModelBefore",
    "ModelReference",
    "Outcome",
    "PairedDifference",
    "PerplexityReport",
    "ProbeReading",
    "Rate",
    "RubricScores",
    "SafetyComparison",
    "SafetyReport",
    "SafetyRun",
    "SeedDifference",
    "Spread",
    "StepReading",
    "StressPlan",
    "StressReport",
    "TaskScore",
    "TensorDrift",
    "TensorPlan",
    "TensorReport",
    "TrainingReading",
    "UtilityScore",
    "Verdict",
    "WorstCase",
]
