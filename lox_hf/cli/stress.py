"""`lox-hf stress`: fine-tuning attacks on a model, its hardened forms and the controls."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lox_hf.cli.config_file import merge_file
from lox_hf.cli.measuring import add_measuring_options
from lox_hf.cli.options import add_loading_options, add_model_options, default_output, parse_rank
from lox_hf.cli.words import parse_number, parse_seeds, parse_settings, parse_words
from lox_hf.config import LoxConfig
from lox_hf.errors import ConfigError

if TYPE_CHECKING:
    from lox_hf.records import StressPlan
    from lox_hf.robustness.controls import ControlTraining
    from lox_hf.robustness.settings import StressConfig

DESCRIPTION = """Attack a safety-aligned model by fine-tuning, with and without LoX and beside controls, at several
learning rates and seeds, and write a report of what came out. A killed run goes on where it was, and a finished one
takes further attacks and seeds. "{seed}" in the names of the models stands for the seed, where each has its own
pair. Look at --dry-run first: the matrix grows fast."""
DEFAULT_HARDENED = "6:1.25"
NONE = "none"
LISTS = ("attacks", "hardened", "controls", "prompts")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "stress", help="attack a model by fine-tuning, with and without LoX", description=DESCRIPTION
    )
    add_model_options(parser, model="the aligned model", output="folder of the run (default: named after the model)")
    add = parser.add_argument
    add("--base-model", metavar="MODEL", help="the model before alignment: folder or Hub id")
    add("--base-revision", metavar="REV", help="revision of the base on the Hub")
    _add_matrix_options(parser)
    measuring = add_measuring_options(parser)
    measuring.add_argument(
        "--readings", type=int, metavar="N", help="how often safety is read along an attack (default: 10)"
    )
    add_loading_options(parser)
    add("--workers", type=int, metavar="N", help="processes side by side, one thread each (default: work in this one)")
    add("--keep-weights", action="store_true", default=None, help="keep every attacked model, in weights/")
    add("--dry-run", action="store_true", default=None, help="check everything, print the plan, train nothing")
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> None:
    """Run the stress test, or print its plan."""
    options = merge_file(options)
    missing = [f"--{name.replace('_', '-')}" for name in ("base_model", "attacks") if not getattr(options, name)]
    if missing:
        raise ConfigError(
            f"A stress test needs {' and '.join(missing)}: the folder or Hub id of the model before alignment, and "
            "names of attacks, such as gsm8k; lox-hf stress --help has the rest."
        )
    config = make_config(options)
    output = Path(options.output) if options.output else default_output(options.model, "stress")
    shown = False if options.json else None
    if options.dry_run:
        from lox_hf.robustness.plan import plan_stress

        plan = plan_stress(config)
        print(plan.to_json() if options.json else f"{_render_plan(plan)}\noutput   {output}\n", end="")
        return
    from lox_hf.robustness.report.render import render_screen
    from lox_hf.robustness.stress import stress_test

    report = stress_test(config, output, progressbar=shown)
    if options.json:
        print(report.to_json(), end="")
        return
    print(render_screen(report))
    print(f"Written to {output}: report.html, report.md, results.json, figures and every cell.")


def make_config(options: argparse.Namespace) -> "StressConfig":
    """Build the settings from the options that were given; the rest keeps its defaults.

    Args:
        options: Complete options.

    Returns:
        The settings.

    Raises:
        ConfigError: If a value cannot be understood or is out of range.
    """
    from lox_hf.robustness.settings import StressConfig

    given: dict[str, Any] = {
        name: parse_words(value) for name in LISTS if (value := getattr(options, name)) is not None
    }
    given["hardened"] = [_hardened(word) for word in given.get("hardened", [DEFAULT_HARDENED])]
    if given.get("controls") == [NONE]:
        given["controls"] = []
    if options.lrs is not None:
        given["learning_rates"] = [parse_number("--lrs", word, float) for word in parse_words(options.lrs)]
    if options.seeds is not None:
        given["seeds"] = parse_seeds(options.seeds)
    for name in ("sft", "lora"):
        if getattr(options, name) is not None:
            given[name] = parse_settings(f"--{name}", getattr(options, name))
    if options.control_training is not None:
        given["control_training"] = _control_training(options.control_training)
    plain = (
        *("base_model", "base_revision", "scan_seeds", "readings", "n", "judge", "template", "max_new_tokens"),
        *("batch_size", "system_prompt", "utility", "utility_data", "utility_n", "safety_data", "calibration_data"),
        *("dtype", "device", "trust_remote_code", "keep_weights", "workers"),
    )
    given |= {name: value for name in plain if (value := getattr(options, name)) is not None}
    return StressConfig(options.model, revision=options.model_revision, **given)


def _add_matrix_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("matrix").add_argument
    add(
        "--attacks",
        nargs="+",
        metavar="ATTACK",
        help="gsm8k, alpaca, dolly, identity-shift, each also as NAME:FILE; custom:FILE for prompts and responses",
    )
    add("--hardened", nargs="+", metavar="R:ALPHA", help=f"the hardened models (default: {DEFAULT_HARDENED})")
    add(
        "--controls",
        nargs="+",
        metavar="NAME",
        help="expo, random, refusal-matched, safeinst, rescaled, retrained, or none (default: all that can be made)",
    )
    add(
        "--lrs",
        nargs="+",
        metavar="LR",
        help="learning rates that every model meets (default: 1, 2, 4 times the attack's own)",
    )
    add("--seeds", nargs="+", metavar="N", help="how many, or the seeds themselves: 12,13,14 (default: 3)")
    add(
        "--scan-seeds",
        type=int,
        metavar="N",
        help="seeds that meet all learning rates; others meet the worst (default: all)",
    )
    add("--sft", nargs="+", metavar="NAME=VALUE", help="settings of TRL's SFTConfig in place of the attacks' own")
    add("--lora", nargs="+", metavar="NAME=VALUE", help="attack by LoRA with these settings of PEFT's LoraConfig")
    add(
        "--control-training",
        nargs="+",
        metavar="NAME=VALUE",
        help="how refusal-matched and retrained are trained, such as learning_rate=2e-4 retrain_steps=40",
    )
    add("--safety-data", metavar="FILE|ID", help="prompts with refusals, for safeinst and refusal-matched")
    add(
        "--calibration-data",
        metavar="FILE|ID",
        help="harmless prompts with answers, for refusal-matched and retrained; none of --prompts",
    )


def _hardened(word: str) -> LoxConfig:
    rank, sign, alpha = word.partition(":")
    if not sign:
        raise ConfigError(f"--hardened takes R:ALPHA such as {DEFAULT_HARDENED}, got '{word}'.")
    return LoxConfig(r=parse_rank(rank), alpha=parse_number("--hardened", alpha, float))


def _control_training(words: list[str]) -> "ControlTraining":
    from lox_hf.robustness.attacks.recipe import meant
    from lox_hf.robustness.controls import ControlTraining

    settings, known = parse_settings("--control-training", words), [item.name for item in fields(ControlTraining)]
    unknown = [f"{name!r}.{meant(name, known)}" for name in settings if name not in known]
    if unknown:
        raise ConfigError(f"--control-training has no setting {' and no '.join(unknown)} It has {', '.join(known)}.")
    return ControlTraining(**settings)


def _render_plan(plan: "StressPlan") -> str:
    from lox_hf.evaluation.report import render_text

    rows: list[tuple[str, ...]] = [("attack", "rows", "held out", "steps", "read after steps", "learning rates")]
    for attack in plan.attacks:
        rates = ", ".join(f"{rate:g}" for rate in attack.learning_rates)
        steps = ", ".join(map(str, attack.readings))
        rows.append((attack.name, str(attack.rows), str(attack.held_out), str(attack.steps), steps, rates))
    seeds = ", ".join(map(str, plan.seeds))
    if plan.scanning_seeds != plan.seeds:
        seeds += f" ({', '.join(map(str, plan.scanning_seeds))} meet all learning rates)"
    lines = [
        *(f"{'model' if not number else '':<9}{name}" for number, name in enumerate(plan.models)),
        f"seeds    {seeds}",
        f"prompts  {plan.harmful} harmful, {plan.harmless} harmless",
        "",
        render_text(rows),
        "",
        f"{plan.cells} runs, about {_duration(plan.seconds)} by a few steps and answers here, utility not counted.",
        f"Memory of a run: {plan.memory_bytes / 2**30:.2f} GiB of weights, gradients and optimiser, and activations.",
        *(f"Not run: {reason}." for reason in plan.not_run),
    ]
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
