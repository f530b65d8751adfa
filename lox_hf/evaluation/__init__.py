"""Measure safety: prompts are answered, answers are judged, verdicts become rates with intervals."""
