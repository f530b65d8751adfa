"""Attack a model by fine-tuning, with and without LoX: the paper's attacks on real models, or others on small ones.

python examples/03_stress_test/run.py --data FOLDER --output out --aligned-model ID --base-model ID
python examples/03_stress_test/run.py --data FOLDER --output out --seeds 1,2,3,4,5

Every option of `lox-hf stress` can be added, and takes the place of what is chosen here.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import inputs
from common.data import load_training_data
from common.options import add_training_options, check_training_options
from common.recipe import LONG
from pairs import make_pairs
from transformers.utils import logging

from lox_hf import LoxError
from lox_hf.cli.main import main as lox_hf
from lox_hf.cli.words import parse_seeds

# The attacks' own settings are the paper's already.
PAPER = ("--hardened", "6:1.25")
# All of this was chosen on seed 0.
SMALL = (
    *("--hardened", "2:0.5", "2:1"),
    *("--lrs", "5e-5", "1e-4", "2e-4", "4e-4"),
    *("--sft", "max_steps=20", "per_device_train_batch_size=16", "lr_scheduler_type=constant"),
    *("max_grad_norm=1", "gradient_checkpointing=false"),
    *("--control-training", "learning_rate=5e-5", "refusal_share=1", "every=2", "retrain_steps=10"),
    *("--max-new-tokens", "24"),
)
# Which texts are for training and which for testing; the same for all pairs, which meet the same prompts.
SPLIT_SEED = 0


def main(arguments: list[str] | None = None) -> None:
    """Run the example.

    Args:
        arguments: Command line; None takes the process's own.
    """
    options, more = parse(arguments)
    logging.disable_progress_bar()
    try:
        command = ["stress", *make_inputs(options), "--output", str(options.output / "stress"), *more]
    except LoxError as error:
        raise SystemExit(f"error: {error}") from error
    print("lox-hf", shlex.join(command), flush=True)
    raise SystemExit(lox_hf(command))


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; what is not known goes to `lox-hf stress`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_options(parser, LONG)
    parser.add_argument("--output", type=Path, required=True, help="folder of everything; one that exists is taken up")
    parser.add_argument("--seeds", nargs="+", default=["3"], help="how many, or the seeds: 12,13,14 (default: 3)")
    options, more = parser.parse_known_args(arguments)
    check_training_options(parser, options)
    return options, more


def make_inputs(options: argparse.Namespace) -> list[str]:
    """Make everything that the stress test reads, and return its options."""
    seeds = ["--seeds", *options.seeds]
    if options.aligned_model:
        pair = ["--model", options.aligned_model, "--base-model", options.base_model]
        return [*pair, *seeds, *PAPER, *inputs.write_paper_inputs(options.output / "inputs", options.data)]
    data = load_training_data(options.data, LONG.texts, SPLIT_SEED)
    written = inputs.write_small_inputs(options.output / "inputs", options.data, data)
    recipe = LONG.with_steps(options.base_steps, options.align_steps)
    pair = make_pairs(options.output / "pairs", data, recipe, parse_seeds(options.seeds))
    return [*pair, *seeds, *SMALL, *written]


if __name__ == "__main__":
    main()
