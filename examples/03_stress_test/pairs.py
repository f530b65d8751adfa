"""A small pair for every seed, trained once: a killed run goes on with the next one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from common.commands import Timer
from common.data import TrainingData
from common.recipe import Recipe
from common.training import make_pair

RECIPE = "recipe.json"


def make_pairs(folder: Path, data: TrainingData, recipe: Recipe, seeds: Sequence[int]) -> list[str]:
    """Train the pairs that are not there yet, `folder`/seed-N/base and `folder`/seed-N/aligned.

    Args:
        folder: Where they go.
        data: What they learn, the same for all seeds.
        recipe: How they learn it.
        seeds: Seeds of the weights and of the order.

    Returns:
        Options of `lox-hf stress`.

    Raises:
        SystemExit: If the folder holds pairs of another recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_recipe(folder / RECIPE, recipe)
    for seed in seeds:
        pair = folder / f"seed-{seed}"
        if pair.exists():
            continue
        # A folder of its own for each run: two runs that train the same pair must not write into one.
        with TemporaryDirectory(prefix=f".seed-{seed}-", dir=folder) as own, Timer(f"trained the pair of seed {seed}"):
            made = Path(own) / "pair"
            make_pair(made, data, recipe, seed=seed)
            if not pair.exists():
                made.rename(pair)
    return ["--model", f"{folder}/seed-{{seed}}/aligned", "--base-model", f"{folder}/seed-{{seed}}/base"]


def _check_recipe(path: Path, recipe: Recipe) -> None:
    text = json.dumps(asdict(recipe), indent=2) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{path.parent} holds pairs of another recipe: name a new folder with --output.")
    path.write_text(text, encoding="utf-8")
