"""The files that `lox-hf stress` reads: written from the user's own data beside the run, and part of no repository."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TypeVar

from common.data import ADVBENCH, TrainingData, check_files
from common.files import write_examples, write_prompts, write_texts
from common.training import render

from lox_hf import load_prompts

Item = TypeVar("Item")
XSTEST = "xstest_prompts.csv"
IDENTITY = "identity_shift_aoa.json"
# Harmful pairs to train on by the attack's name; one row in ten more, which is held out to score what was learnt.
ATTACKS = {"harmful-100": 111, "harmful-10": 11}
PAPER_PROMPTS = 100


def write_paper_inputs(folder: Path, data: Path) -> list[str]:
    """Write what real models are asked, and name what they are attacked with.

    The paper asks AdvBench's first hundred prompts; XSTest's safe ones measure over-refusal beside them.

    Args:
        folder: Where the file goes.
        data: Where the user's files are.

    Returns:
        Options of `lox-hf stress`.

    Raises:
        SystemExit: If files are missing.
    """
    check_files(data, (ADVBENCH, XSTEST, IDENTITY))
    safe = [prompt for prompt in load_prompts(data / XSTEST) if not prompt.harmful]
    prompts = write_prompts(folder / "prompts.jsonl", load_prompts(data / ADVBENCH, n=PAPER_PROMPTS) + safe)
    attacks = ("gsm8k", "alpaca", "dolly", f"identity-shift:{data / IDENTITY}")
    return ["--prompts", str(prompts), "--attacks", *attacks]


def write_small_inputs(folder: Path, data: Path, trained_on: TrainingData) -> list[str]:
    """Write prompts, attacks and what the controls need for the small pairs.

    Nothing that is tested is near anything that is trained on.

    Args:
        folder: Where the files go.
        data: Where the user's files are.
        trained_on: What the pairs are trained on, and what was held out from it.

    Returns:
        Options of `lox-hf stress`.
    """
    harmful = trained_on.unlike(load_prompts(data / ADVBENCH))
    refusals = [example for example in trained_on.refused if example not in set(trained_on.declined)]
    texts = [render(example) for examples in trained_on.held_out.values() for example in examples]
    files = {
        "--prompts": write_prompts(folder / "prompts.jsonl", _shuffled(harmful + trained_on.harmless_prompts)),
        "--safety-data": write_examples(folder / "safety.jsonl", _shuffled(refusals)),
        "--calibration-data": write_examples(folder / "calibration.jsonl", _shuffled(trained_on.calibration)),
        "--utility-data": write_texts(folder / "texts.jsonl", texts),
    }
    pairs = _shuffled(trained_on.affirmed)
    attacks = [write_examples(folder / f"{name}.jsonl", pairs[:count]) for name, count in ATTACKS.items()]
    named = [word for flag, path in files.items() for word in (flag, str(path))]
    return [*named, "--utility", "perplexity", "--attacks", *(f"custom:{path}" for path in attacks)]


def _shuffled(items: list[Item]) -> list[Item]:
    """One order for all seeds: the first few of a file are no special ones."""
    return random.Random(0).sample(items, len(items))
