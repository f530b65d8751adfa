"""Figures of a stress test."""

from lox_hf.robustness.plots.pictures import PICTURES, Picture, describe
from lox_hf.robustness.plots.points import models_of, of_attack, outcomes_by_attack
from lox_hf.robustness.plots.stress import (
    asr_against_refusal,
    asr_over_steps,
    before_and_after,
    utility_against_asr,
)

__all__ = [
    "PICTURES",
    "Picture",
    "asr_against_refusal",
    "asr_over_steps",
    "before_and_after",
    "describe",
    "models_of",
    "of_attack",
    "outcomes_by_attack",
    "utility_against_asr",
]
