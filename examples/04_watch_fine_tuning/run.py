"""Fine-tune an aligned model three times under `LoxCallback`: watched, stopped in time, and re-applied at the end.

python examples/04_watch_fine_tuning/run.py
python examples/04_watch_fine_tuning/run.py --aligned-model ID --base-model ID --dataset gsm8k --lora r=16
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.commands import Timer
from common.options import positive
from finetuning import Outcome, fine_tune, load_start, measure, measure_folder, saving
from inputs import LEARNING_RATES, ROWS_NAME, TESTED, Inputs, real_inputs, small_inputs

from lox_hf import LoxCallback, LoxError
from lox_hf.demo.training import Recipe
from lox_hf.evaluation.report import render_text

FILES = ("readings.jsonl", "drift.png", "drift.svg")
HEADER = ("model", "steps", "ASR", "over-refusal", "task right", "task loss", "retention", "R_ft / R_align")
EVERY, REAL_EVERY = 2, 50


def main(arguments: list[str] | None = None) -> None:
    """Run the example.

    Args:
        arguments: Command line; None takes the process's own.
    """
    options = parse(arguments)
    try:
        inputs = make_inputs(options)
        rows = list(run_all(inputs, options))
    except LoxError as error:
        raise SystemExit(f"error: {error}") from error
    print("\n" + render_text([HEADER, *(row(name, outcome) for name, outcome in rows)]))
    print(f"\nASR and over-refusal on {describe(inputs)}; none of them was the probe's.")
    print("A high retention does not mean that the model is safe: read ASR.")
    for name in ("log", "stop", "reapply"):
        folder = options.output / name / "lox"
        print(f"{folder}: {', '.join(file for file in FILES if (folder / file).exists())}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("lox-watch"), help="new folder for the three runs (default: lox-watch)")
    add("--every", type=positive, help=f"steps between readings (default {EVERY}; {REAL_EVERY} for a real model)")
    add("--above", type=float, default=0.1, help="stop where the probe's ASR is above this (default 0.1)")
    add("--strength", type=float, default=1.5, help="retention that reapply restores (default 1.5)")
    add("--seed", type=int, default=0, help="of the order of rows, and which small pair (default 0)")
    add("--sft", nargs="+", type=setting, default=[], metavar="NAME=VALUE", help="further settings of SFTConfig")
    add("--lora", nargs="*", type=setting, metavar="NAME=VALUE", help="train by LoRA, with settings of LoraConfig")
    small = parser.add_argument_group("the demonstration's small models, which is the default").add_argument
    small("--fine-tuning", choices=sorted(LEARNING_RATES), default="benign", help="what it learns (default: benign)")
    small("--pairs", type=Path, default=Path("lox-demo"), help="folder that keeps trained pairs (default: lox-demo)")
    small("--base-steps", type=positive, default=Recipe.base_steps, help="of a new pair (default %(default)s)")
    small("--align-steps", type=positive, default=Recipe.alignment_steps, help="of a new pair (default %(default)s)")
    real = parser.add_argument_group("a model of your own").add_argument
    real("--aligned-model", metavar="ID", help="the model to fine-tune: Hub id or folder")
    real("--base-model", metavar="ID", help="the model before alignment")
    real("--subspace", metavar="ID", help="directions that lox-hf subspace made, in place of the base model")
    real("--dataset", metavar="NAME", help="what it learns: gsm8k, alpaca, dolly, or custom:FILE-OR-HUB-ID")
    real("--prompts", nargs="+", default=["advbench", "xstest"], help="sets or files (default: advbench xstest)")
    real("--n", type=positive, default=TESTED, help=f"prompts of a kind in the test (default {TESTED})")
    real("--r", type=positive, default=6, help="directions of a matrix, the paper's k (default 6)")
    options = parser.parse_args(arguments)
    if options.output.exists():
        parser.error(f"--output {options.output} exists: name a new folder")
    if options.aligned_model and not (options.dataset and (options.base_model or options.subspace)):
        parser.error("--aligned-model needs --dataset, and --base-model or --subspace")
    if not options.aligned_model and (options.base_model or options.subspace or options.dataset):
        parser.error("--base-model, --subspace and --dataset belong to --aligned-model")
    return options


def setting(word: str) -> tuple[str, Any]:
    """Read a setting as NAME=VALUE."""
    name, equals, value = word.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{word!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def make_inputs(options: argparse.Namespace) -> Inputs:
    """Return the models, the rows and the prompts."""
    training = {"sft": dict(options.sft), "lora": None if options.lora is None else dict(options.lora)}
    if options.aligned_model:
        return real_inputs(options, **training)
    recipe = Recipe(base_steps=options.base_steps, alignment_steps=options.align_steps)
    rows = options.output / ROWS_NAME
    with Timer(f"small pair of seed {options.seed}, trained where {options.pairs} lacks it"):
        return small_inputs(options.pairs, rows, options.fine_tuning, options.seed, recipe, **training)


def run_all(inputs: Inputs, options: argparse.Namespace) -> Iterator[tuple[str, Outcome]]:
    """Fine-tune under each action, and yield what comes out of it."""
    every = options.every or (REAL_EVERY if options.aligned_model else EVERY)
    yield "before", measure(inputs, *load_start(inputs, 0.0), steps=0)
    actions: dict[str, dict[str, Any]] = {
        "log": {"action": "log"},
        "stop": {"action": "stop", "metric": "asr", "above": options.above},
        "reapply": {"action": "reapply", "strength": options.strength},
    }
    for name, arguments in actions.items():
        # This is all that watching takes: directions, what to do, and how often to look.
        callback = LoxCallback(
            inputs.subspace, every_n_steps=every, base_model=inputs.base, probe=inputs.probe(), **arguments
        )
        saved = saving(every) if name == "stop" else {}
        with Timer(name):
            trained = fine_tune(inputs, callback, options.output / name, seed=options.seed, **saved)
        model, tokenizer, steps = trained
        yield name, measure(inputs, model, tokenizer, steps)
        safe = callback.last_safe_checkpoint
        if name == "stop" and callback.readings[-1].tripped and safe is not None:
            yield f"stop, {safe.name}", measure_folder(inputs, safe, int(safe.name.rpartition("-")[2]))


def row(name: str, outcome: Outcome) -> tuple[str, ...]:
    """Return one line of the table."""
    shares = (outcome.asr, outcome.over_refusal, outcome.task)
    numbers = (outcome.task_loss, outcome.retention, outcome.ratio)
    percent = ["-" if math.isnan(share) else f"{100 * share:.0f} %" for share in shares]
    return (name, str(outcome.steps), *percent, *("-" if math.isnan(x) else f"{x:.2f}" for x in numbers))


def describe(inputs: Inputs) -> str:
    """Say what was asked."""
    harmful = sum(prompt.harmful for prompt in inputs.measurement.prompts)
    return f"{harmful} harmful and {len(inputs.measurement.prompts) - harmful} harmless prompts"


if __name__ == "__main__":
    main()
