"""Measure a model's safety before and after hardening, on real prompts that it was not trained on.

python examples/02_measure_safety/run.py --data FOLDER
python examples/02_measure_safety/run.py --data FOLDER --aligned-model ID --base-model ID --r 6 --alpha 1.25
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import prompts
import second_judge
import tables
import training
from data import load_training_data
from transformers.utils import logging

from lox_hf import LoxError, SafetyComparison, SafetyReport
from lox_hf.cli.main import main as lox_hf

SMALL_MODEL = """
The judge tells refusals from other answers, not harm: a model of a million weights has no harmful knowledge to give.
What JailbreakBench and XSTest say of so small a model means little, and none of this is an attack on its weights."""


def main(arguments: list[str] | None = None) -> None:
    """Run the example.

    Args:
        arguments: Command line; None takes the process's own.
    """
    options = parse(arguments)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        try:
            run(options, options.output or Path(temporary))
        except LoxError as error:
            raise SystemExit(f"error: {error}") from error


def run(options: argparse.Namespace, folder: Path) -> None:
    """Make or take the models, harden, measure, and print what came out.

    Args:
        options: Command line.
        folder: Where everything goes.
    """
    trained_on = None if options.aligned_model else load_training_data(options.data, options.seed)
    sets = prompts.load_sets(options.data, trained_on)
    models = {"base": options.base_model, "aligned": options.aligned_model, "hardened": folder / "hardened"}
    if trained_on:
        models |= {"base": folder / "base", "aligned": folder / "aligned"}
        steps = {"base_steps": options.base_steps, "align_steps": options.align_steps}
        with Timer(f"trained a base, {options.base_steps} steps, and aligned it, {options.align_steps} steps"):
            training.make_pair(folder, trained_on, **steps, seed=options.seed)
    harden = ("harden", models["aligned"], "--base-model", models["base"], "--output", models["hardened"])
    run_command(*harden, "--r", options.r, "--alpha", options.alpha)
    files = prompts.write_sets(sets, folder / "prompts", options.seed)
    reports, changes = measure(models, files, folder / "asr", options)
    print(tables.render_rates(reports))
    print(tables.render_changes(changes))
    print(tables.render_openings({name: folder / "asr" / name / "advbench" for name in models}))
    print(second_judge.judge_again(folder / "asr" / "aligned" / "advbench"))
    if trained_on:
        print(SMALL_MODEL)
    if options.output:
        print(f"\nEvery answer, verdict and report is under {folder / 'asr'}.")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    data = os.environ.get("LOX_HF_TEST_DATA") or None
    add("--data", type=Path, default=data, help="folder of the files (default: $LOX_HF_TEST_DATA)")
    add("--aligned-model", metavar="ID", help="measure this model (Hub id or folder) instead of training one")
    add("--base-model", metavar="ID", help="the model before alignment, with --aligned-model")
    add("--output", type=Path, help="keep checkpoints, prompts, answers and reports in this new folder")
    add("--r", type=int, default=2, help="directions to extrapolate, the paper's k (default 2)")
    add("--alpha", type=float, default=1.0, help="strength (default 1.0)")
    add("--n", type=int, help="measure on n prompts of each set (default: all)")
    add("--max-new-tokens", type=int, default=24, help="longest answer (default 24)")
    add("--base-steps", type=positive, default=training.BASE_STEPS, help="steps of the base (default %(default)s)")
    add(
        "--align-steps",
        type=positive,
        default=training.ALIGN_STEPS,
        help="steps of the alignment (default %(default)s)",
    )
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if (options.aligned_model is None) != (options.base_model is None):
        parser.error("--aligned-model and --base-model belong together")
    if options.data is None:
        parser.error("name the folder of the data with --data or LOX_HF_TEST_DATA; README.md says what belongs there")
    if options.output and options.output.exists():
        parser.error(f"--output {options.output} exists: name a new folder")
    return options


def positive(text: str) -> int:
    """Read a number of steps."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of steps")
    return int(text)


def measure(
    models: dict[str, str | Path], files: dict[str, Path], output: Path, options: argparse.Namespace
) -> tuple[dict[str, dict[str, SafetyReport]], dict[str, SafetyComparison]]:
    """Measure every model on every set by `lox-hf asr`, and compare the hardened with the aligned one.

    Args:
        models: Name or folder of base, aligned and hardened.
        files: Prompt file of every set.
        output: Folder of the runs, `output`/MODEL/SET.
        options: Command line.

    Returns:
        Reports by set and model, and comparisons by set.
    """
    reports: dict[str, dict[str, SafetyReport]] = {name: {} for name in files}
    changes = {}
    for name, file in files.items():
        for model, path in models.items():
            command = ("asr", path, "--prompts", file, "--judge", "refusal", "--output", output / model / name)
            limits = ("--max-new-tokens", options.max_new_tokens, *(("--n", options.n) if options.n else ()))
            compared = ("--compare", output / "aligned" / name) if model == "hardened" else ()
            found = run_command(*command, *limits, *compared)
            if compared:
                changes[name] = SafetyComparison.from_dict(found["comparison"])
                (found,) = found["reports"]
            reports[name][model] = SafetyReport.from_dict(found)
    return reports, changes


def run_command(*words: object) -> dict[str, Any]:
    """Run a `lox-hf` command with --json and return its record; in this process, which saves the imports.

    Raises:
        SystemExit: If the command fails; it has said why.
    """
    command = [str(word) for word in words]
    with Timer("lox-hf " + " ".join(command)), contextlib.redirect_stdout(io.StringIO()) as printed:
        status = lox_hf([*command, "--json"])
    if status:
        raise SystemExit(status)
    return json.loads(printed.getvalue())


class Timer:
    """Print what ran, and how long it took."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        print(f"{self.text}: {time.perf_counter() - self.start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
