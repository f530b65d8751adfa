"""A run that a test kills: `evaluate_safety` on a loaded model with a rubric's judge, in a process of its own."""

from pathlib import Path

from lox_hf.evaluation.judges.rubric import RubricJudge
from lox_hf.evaluation.models.loading import load_model
from lox_hf.evaluation.safety import evaluate_safety


def measure(model: Path, prompts: Path, output: Path, judge_url: str) -> None:
    """Answer and judge, a few prompts at once, so that there is something to interrupt."""
    loaded, tokenizer = load_model(model)
    judge = RubricJudge.from_endpoint("judge", judge_url, concurrency=2)
    evaluate_safety(
        loaded,
        tokenizer,
        prompts,
        judge,
        output_dir=output,
        batch_size=4,
        max_new_tokens=24,
        progressbar=False,
    )
