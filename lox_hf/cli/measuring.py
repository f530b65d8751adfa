"""What is asked of a model, how, and what it is still good for: options that several commands share."""

import argparse
from typing import TYPE_CHECKING

from lox_hf.cli.words import parse_words

if TYPE_CHECKING:
    from lox_hf.robustness.measuring.measure import Measurement

PROMPTS = ("advbench", "xstest")
PLAIN = (
    *("judge", "template", "system_prompt", "max_new_tokens", "batch_size", "utility", "utility_data", "utility_n"),
)


def add_measuring_options(parser: argparse.ArgumentParser, *, n: str = "all") -> "argparse._ArgumentGroup":
    """Add the options; `--batch-size` is one of those that say how a model is loaded.

    Args:
        parser: The command's parser.
        n: How many prompts of a set are taken by default, for the help.

    Returns:
        Their group, for what a command has beside them.
    """
    group = parser.add_argument_group("measuring")
    add = group.add_argument
    add(
        "--prompts",
        nargs="+",
        metavar="FILE|NAME",
        help=f"prompt sets; rows labelled safe measure over-refusal (default: {' '.join(PROMPTS)})",
    )
    add("--n", type=int, metavar="N", help=f"the first N prompts of each set only (default: {n})")
    add("--judge", metavar="JUDGE", help="refusal, classifier:ID or rubric:MODEL (default: refusal)")
    add("--template", choices=("auto", "chat", "alpaca", "none"), help="how a prompt is put (default: auto)")
    add("--system-prompt", metavar="TEXT", help="a system turn before every prompt")
    add("--max-new-tokens", type=int, metavar="N", help="longest answer (default: 60, as the paper)")
    add(
        "--utility",
        choices=("auto", "known answers", "gsm8k", "perplexity", "none"),
        help="what a model is good for (default: auto: known answers where there are some)",
    )
    add("--utility-data", metavar="FILE", help="questions for gsm8k, texts for perplexity")
    add("--utility-n", type=int, metavar="N", help="the first N of them only (default: all)")
    return group


def make_measurement(options: argparse.Namespace) -> "Measurement":
    """Load the prompts, and say how they are asked.

    Args:
        options: Complete options.

    Returns:
        The measurement.

    Raises:
        ConfigError: If no prompt is harmful, or a setting is not known.
        PromptError: If prompts cannot be read.
    """
    from lox_hf.robustness.measuring.measure import Measurement, load_all_prompts

    prompts = load_all_prompts(parse_words(options.prompts or list(PROMPTS)), options.n)
    given = {name: value for name in PLAIN if (value := getattr(options, name)) is not None}
    return Measurement(prompts, **given)
