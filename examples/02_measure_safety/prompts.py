"""The prompts that the models are measured on: three real sets, without what is near anything trained on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import similar
from data import ADVBENCH, TrainingData, check_files

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
    known = [similar.words(example.prompt) for example in trained_on.examples]
    for name, found in sets.items():
        sets[name] = [prompt for prompt in found if not similar.near_any(prompt.text, known)]
    sets["advbench"] += trained_on.held_out
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
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.jsonl" for name in sets}
    for name, file in files.items():
        shuffled = random.Random(seed).sample(sets[name], len(sets[name]))
        rows = [
            {
                "prompt": prompt.text,
                "label": "harmful" if prompt.harmful else "harmless",
                "category": prompt.category,
            }
            for prompt in shuffled
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files
