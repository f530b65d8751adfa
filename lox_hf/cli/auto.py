"""`lox-hf auto`: the whole way by one command."""

import argparse
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lox_hf.cli import after_auto
from lox_hf.cli.config_file import merge_file
from lox_hf.cli.grid import add_grid_options, parse_grid
from lox_hf.cli.measuring import PLAIN, add_measuring_options
from lox_hf.cli.options import add_loading_options, add_model_options, default_output
from lox_hf.cli.words import parse_number, parse_settings, parse_words
from lox_hf.errors import ConfigError

if TYPE_CHECKING:
    from lox_hf.auto.settings import AutoConfig
    from lox_hf.records import AutoPlan

DESCRIPTION = """The whole way from a safety-aligned model to a hardened one, with nothing to understand first: finds
the base, tries 30 hardenings and chooses one that costs little and keeps most safety under a short fine-tuning,
hardens the checkpoint, measures it before and after on prompts that nothing was chosen by, and writes a report with
everything. It stops early and says so where hardening would not help. A killed run goes on with the same command.
Look at --dry-run first."""
EPILOG = (
    """LoX raises the cost of losing safety, it does not make a model safe: `lox-hf stress` measures more of it."""
)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "auto", help="choose how to harden, harden, and measure: all in one", description=DESCRIPTION, epilog=EPILOG
    )
    add_model_options(parser, model="the aligned model", output="folder of the run (default: named after the model)")
    add = parser.add_argument
    add("--base-model", metavar="MODEL", help="the model before alignment (default: the one the aligned model names)")
    add("--base-revision", metavar="REV", help="revision of the base on the Hub")
    _add_choice_options(parser)
    add_measuring_options(parser, n="200: 100 to choose by, 100 to report on")
    add_loading_options(parser)
    add("--dry-run", action="store_true", default=None, help="check everything, print the plan, measure nothing")
    after_auto.add_options(parser)
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> None:
    """Go the whole way, or print the plan; then do what is asked with the result."""
    options = merge_file(options)
    after_auto.check(options)
    config = make_config(options)
    output = Path(options.output) if options.output else default_output(options.model, "auto")
    from lox_hf.auto.report import HARDENED, render_screen
    from lox_hf.auto.run import auto_harden, plan_auto

    if options.dry_run:
        plan = plan_auto(config, output)
        print(plan.to_json() if options.json else f"{_render_plan(plan)}\noutput    {output}\n", end="")
        return

    def tell(line: str) -> None:
        if not options.json:
            print(_wrapped(line), flush=True)

    report = auto_harden(config, output, tell=tell, progressbar=False if options.json else None)
    if options.json:
        print(report.to_json(), end="")
    else:
        print(f"\n{render_screen(report)}\n\nWritten to {output}: {', '.join(report.files.values())}.")
    if report.config is not None:
        after_auto.go_on(output / HARDENED, options)


def make_config(options: argparse.Namespace) -> "AutoConfig":
    """Build the settings from the options that were given; the rest keeps its defaults.

    Args:
        options: Complete options.

    Returns:
        The settings.

    Raises:
        ConfigError: If a value cannot be understood or is out of range, or options contradict each other.
    """
    from lox_hf.auto.settings import AutoConfig

    names = (*PLAIN, "n", "base_model", "base_revision", "dtype", "device", "trust_remote_code")
    names += ("attack_steps", "readings", "seed")
    given: dict[str, Any] = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.prompts is not None:
        given["prompts"] = parse_words(options.prompts)
    given |= parse_grid(options)
    if options.attack_lr is not None:
        given["attack_learning_rate"] = parse_number("--attack-lr", str(options.attack_lr), float)
    for name in ("sft", "lora"):
        if getattr(options, name) is not None:
            given[name] = parse_settings(f"--{name}", getattr(options, name))
    if options.no_attack and options.attack is not None:
        raise ConfigError("--attack and --no-attack contradict each other: leave one of them out.")
    if options.no_attack or options.attack is not None:
        given["attack"] = options.attack
    return AutoConfig(options.model, revision=options.model_revision, **given)


def _add_choice_options(parser: argparse.ArgumentParser) -> None:
    add = add_grid_options(parser, "what is tried", targets="all,attention").add_argument
    add(
        "--attack",
        metavar="ATTACK",
        help="fine-tuning that decides: gsm8k, alpaca, dolly, each also as NAME:FILE, or custom:FILE for prompts and "
        "responses of one's own (default: gsm8k)",
    )
    add("--no-attack", action="store_true", default=None, help="choose without one: the strongest edit that is cheap")
    add("--attack-steps", type=int, metavar="N", help="its optimiser steps (default: 50)")
    add("--attack-lr", metavar="LR", help="its highest learning rate (default: the attack's own)")
    add("--sft", nargs="+", metavar="NAME=VALUE", help="settings of TRL's SFTConfig in place of the attack's own")
    add("--lora", nargs="+", metavar="NAME=VALUE", help="attack by LoRA, with these settings of PEFT's LoraConfig")
    add("--readings", type=int, metavar="N", help="how often safety is read along it (default: 5)")
    add("--seed", type=int, metavar="N", help="its seed (default: 0)")


def _wrapped(line: str) -> str:
    """A line of what is told, its further lines below what stands behind the name."""
    from lox_hf.evaluation.report import SCREEN_WIDTH, one_line

    name, text = line[:8], one_line(line[10:])
    return textwrap.fill(text, SCREEN_WIDTH, initial_indent=f"{name}  ", subsequent_indent=" " * 10)


def _render_plan(plan: "AutoPlan") -> str:
    attacks = f", {plan.attacked} of them under an attack of {plan.attack_steps} steps" if plan.attacked else ""
    return "\n".join(
        [
            *(_wrapped(str(choice)) for choice in plan.choices),
            f"{'measured':<8}  up to {plan.measured + plan.attacked} models on {plan.prompts} prompts each{attacks}",
        ]
    )
