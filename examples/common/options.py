"""Options that several examples have."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from common.recipe import Recipe


def add_training_options(parser: argparse.ArgumentParser, recipe: Recipe) -> None:
    """Add where the data lie, which models to take instead, and how long to train where none are named."""
    add = parser.add_argument
    data = os.environ.get("LOX_HF_TEST_DATA") or None
    add("--data", type=Path, default=data, help="folder of the files (default: $LOX_HF_TEST_DATA)")
    add("--aligned-model", metavar="ID", help="take this model (Hub id or folder) instead of training one")
    add("--base-model", metavar="ID", help="the model before alignment, with --aligned-model")
    add("--base-steps", type=positive, default=recipe.base.steps, help="steps of the base (default %(default)s)")
    add(
        "--align-steps",
        type=positive,
        default=recipe.alignment.steps,
        help="steps of the alignment (default %(default)s)",
    )


def positive(text: str) -> int:
    """Read a number of steps."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of steps")
    return int(text)


def check_training_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Stop with one line where they do not fit each other."""
    if (options.aligned_model is None) != (options.base_model is None):
        parser.error("--aligned-model and --base-model belong together")
    if options.data is None:
        parser.error("name the folder of the data with --data or LOX_HF_TEST_DATA; README.md says what belongs there")
