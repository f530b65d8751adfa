"""Frozen results of every stage, to and from JSON. The command line, cards and logs only read them."""

from lox_hf.records.base import JsonRecord, ModelReference
from lox_hf.records.comparison import JudgeAgreement, PairedDifference, SafetyComparison, SafetyRun
from lox_hf.records.hardening import REPORT_NAME, HardeningPlan, HardeningReport, TensorPlan, TensorReport
from lox_hf.records.safety import CategoryRates, Outcome, Rate, RubricScores, SafetyReport, Verdict
from lox_hf.records.utility import AccuracyReport, PerplexityReport

__all__ = [
    "REPORT_NAME",
    "AccuracyReport",
    "CategoryRates",
    "HardeningPlan",
    "HardeningReport",
    "JsonRecord",
    "JudgeAgreement",
    "ModelReference",
    "Outcome",
    "PairedDifference",
    "PerplexityReport",
    "Rate",
    "RubricScores",
    "SafetyComparison",
    "SafetyReport",
    "SafetyRun",
    "TensorPlan",
    "TensorReport",
    "Verdict",
]
