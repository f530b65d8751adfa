"""The prompts that the models are measured on: three real sets, without what is near anything trained on."""

from __future__ import annotations

import random
from pathlib import Path

from common.data import ADVBENCH, TrainingData, check_files
from common.files import write_prompts

from lox_hf import Prompt, load_prompts

FILES = {"advbench": ADVBENCH, "jailbreakbench": "jailbreakbench_behaviors.csv", "xstest": "xstest_prompts.csv"}


def load_sets(folder: Path, trained_on: TrainingData | None = None) -> dict[str, list[Prompt]]:
    """Read AdvBench, JailbreakBench and XSTest, which labels half of its prompts as safe.

    Args:
        folder: Where the files are.
        trained_on: What the models were trained on; prompts near it are left out, and its held-out harmless prompts
            come to AdvBench. None where they were trained elsewhere.

    Returns:
        Prompts by the name of their set.

    Raises:
        SystemExit: If files are missing.
    """
    check_files(folder, FILES.values())
    sets = {name: load_prompts(folder / file) for name, file in FILES.items()}
    if trained_on is None:
        return sets
    sets = {name: trained_on.unlike(found) for name, found in sets.items()}
    sets["advbench"] += trained_on.harmless_prompts
    return sets


def write_sets(sets: dict[str, list[Prompt]], folder: Path, seed: int) -> dict[str, Path]:
    """Write each set to a JSONL file as `lox-hf asr --prompts` reads it.

    Args:
        sets: Prompts by the name of their set.
        folder: Where the files go; made where it does not exist.
        seed: Seed of the order, so that the first n are no special ones.

    Returns:
        The files by the name of their set.
    """
    return {
        name: write_prompts(folder / f"{name}.jsonl", random.Random(seed).sample(found, len(found)))
        for name, found in sets.items()
    }
