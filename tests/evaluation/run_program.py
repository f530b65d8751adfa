"""A run that a test kills: `evaluate_safety` by the command line's own parts, in a process of its own."""

from pathlib import Path

from lox_hf.evaluation.models.loading import load_model

from lox_hf.evaluation.safety import evaluate_safety


def measure(model: Path, prompts: Path, output: Path) -> None:
    """Answer and judge, two prompts at once, so that there is something to interrupt."""
    loaded, tokenizer = load_model(model)
    evaluate_safety(loaded, tokenizer, prompts, output_dir=output, batch_size=2, max_new_tokens=24, progressbar=False)
