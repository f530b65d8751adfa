"""Measure a model's safety before and after hardening, on real prompts that it was not trained on.

python examples/02_measure_safety/run.py --data FOLDER
python examples/02_measure_safety/run.py --data FOLDER --aligned-model ID --base-model ID --r 6 --alpha 1.25
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import prompts
import second_judge
import tables
from common import training
from common.commands import Timer, run_command
from common.data import load_training_data
from common.options import add_training_options, check_training_options
from common.recipe import SHORT
from transformers.utils import logging

from lox_hf import LoxError, SafetyComparison, SafetyReport

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
    trained_on = None if options.aligned_model else load_training_data(options.data, SHORT.texts, options.seed)
    sets = prompts.load_sets(options.data, trained_on)
    models = {"base": options.base_model, "aligned": options.aligned_model, "hardened": folder / "hardened"}
    if trained_on:
        models |= {"base": folder / "base", "aligned": folder / "aligned"}
        recipe = SHORT.with_steps(options.base_steps, options.align_steps)
        with Timer(f"trained a base, {options.base_steps} steps, and aligned it, {options.align_steps} steps"):
            training.make_pair(folder, trained_on, recipe, seed=options.seed)
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
    add_training_options(parser, SHORT)
    add = parser.add_argument
    add("--output", type=Path, help="keep checkpoints, prompts, answers and reports in this new folder")
    add("--r", type=int, default=2, help="directions to extrapolate, the paper's k (default 2)")
    add("--alpha", type=float, default=1.0, help="strength (default 1.0)")
    add("--n", type=int, help="measure on n prompts of each set (default: all)")
    add("--max-new-tokens", type=int, default=24, help="longest answer (default 24)")
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    check_training_options(parser, options)
    if options.output and options.output.exists():
        parser.error(f"--output {options.output} exists: name a new folder")
    return options


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


if __name__ == "__main__":
    main()
