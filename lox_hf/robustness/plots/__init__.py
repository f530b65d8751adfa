"""Figures of results. The only place that imports matplotlib, and it does so when a figure is drawn."""

from lox_hf.robustness.plots.pictures import PICTURES, Picture, describe
from lox_hf.robustness.plots.points import models_of, of_attack, outcomes_by_attack
from lox_hf.robustness.plots.stress import (
    asr_against_refusal,
    asr_over_steps,
    before_and_after,
    utility_against_asr,
)
from lox_hf.robustness.plots.style import save_figure, svg_text

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
    "save_figure",
    "svg_text",
    "utility_against_asr",
]
