"""`lox-hf select`: which rank, alpha and targets, measured on a grid."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lox_hf.cli.config_file import merge_file, refuse_without
from lox_hf.cli.grid import add_grid_options, parse_grid, parse_limits
from lox_hf.cli.measuring import add_measuring_options, make_measurement
from lox_hf.cli.options import (
    add_base_options,
    add_loading_options,
    add_model_options,
    default_output,
    load_for_running,
    parse_modules,
    saved_subspace,
)
from lox_hf.cli.words import parse_settings
from lox_hf.config import CONFIG_NAME, LoxConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lox_hf.auto.attack import ShortAttack
    from lox_hf.auto.measures import CandidateMeasures
    from lox_hf.robustness.attacks.recipe import Attack
    from lox_hf.robustness.measuring.measure import Measurement
    from lox_hf.subspace import SafetySubspace

DESCRIPTION = """Harden a model in every way of a grid (rank, alpha, which weights), in memory and from one
decomposition, measure each, and recommend one that costs no more than the limits allow, or say that none does. With
--attack the candidates are fine-tuned for a short while and robustness decides; without it the strongest edit is
named, which need not be the most robust. Limits by default: attack success +2 points, over-refusal +5, degenerate
answers +2, known answers and GSM8K -2, KL divergence on harmless prompts 0.1 nats, perplexity +5 %. A killed run goes
on where it was."""
TARGETS = ("all", "attention", "no-embeddings")
KL_PROMPTS = 100
"""How many harmless prompts the divergence is read on: what is kept of each is a number for every word."""
OF_THE_ATTACK = ("attack_most", "attack_lr", "attack_steps", "sft")
REPORT_NAME, STEM = "report.md", "selection"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser("select", help="choose rank, alpha and targets", description=DESCRIPTION)
    add_model_options(parser, model="the aligned model", output="folder of the run (default: named after the model)")
    add_base_options(parser)
    _add_grid_options(parser)
    _add_attack_options(parser)
    measuring = add_measuring_options(parser)
    measuring.add_argument(
        "--kl-prompts",
        metavar="FILE|NAME",
        help=f"harmless prompts for the KL divergence (default: the first {KL_PROMPTS} harmless ones of --prompts)",
    )
    add_loading_options(parser)
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> None:
    """Select, write the record, the report and the figure, and print them."""
    options = merge_file(options)
    refuse_without(options, "attack", OF_THE_ATTACK)
    from lox_hf.analysis.limits import check_limits
    from lox_hf.analysis.select import RUN, select
    from lox_hf.auto.selection_report import render_selection, selection_markdown
    from lox_hf.plots.selection import save_selection_plot
    from lox_hf.plots.style import check_matplotlib
    from lox_hf.run_folder import RunFolder

    grid = _grid(options)
    check_limits(grid["limits"])
    output = Path(options.output) if options.output else default_output(options.model, "select")
    RunFolder(output, RUN).check()  # before a model is loaded, and not only after it
    check_matplotlib()
    measurement = make_measurement(options)
    attack = _attack(options)
    subspace = saved_subspace(options)
    config = _config(options, subspace)
    model, tokenizer = load_for_running(options)
    measures = _measures(options, measurement, model, tokenizer)
    short = _short_attack(options, attack, measurement, tokenizer)
    found = select(
        model,
        options.base_model,
        measures.score,
        **grid,
        attack_fn=None if short is None else short.score,
        config=config,
        aligned_model=options.model,
        subspace=subspace,
        about=measures.settings(),
        attack_about=None if short is None else short.settings(),
        output_dir=output,
        revision=options.model_revision,
        trust_remote_code=bool(options.trust_remote_code),
        progressbar=False if options.json else None,
    )
    save_selection_plot(found, output / STEM)
    with RunFolder(output, RUN) as folder:
        folder.write(REPORT_NAME, selection_markdown(found, f"{STEM}.png"))
    if options.json:
        print(found.to_json(), end="")
        return
    print(render_selection(found))
    print(f"\nWritten to {output}: {REPORT_NAME}, {STEM}.json, .png and .svg, the directions and every point.")
    if found.recommended is not None:
        print(f"To harden with it:\n  lox-hf harden {options.model} --config {output / CONFIG_NAME}")


def _add_grid_options(parser: argparse.ArgumentParser) -> None:
    add = add_grid_options(parser, "grid", targets=",".join(TARGETS)).add_argument
    add("--exclude-modules", nargs="+", metavar="NAME", help="modules that no candidate edits")


def _add_attack_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("attack").add_argument
    add(
        "--attack",
        metavar="ATTACK",
        help="gsm8k, alpaca, dolly, each also as NAME:FILE; custom:FILE, as lox-hf stress",
    )
    add("--attack-most", type=int, metavar="N", help="how many candidates are attacked (default: 8)")
    add("--attack-lr", type=float, metavar="LR", help="its learning rate (default: the attack's own)")
    add("--attack-steps", type=int, metavar="N", help="its optimiser steps (default: the attack's own)")
    add("--sft", nargs="+", metavar="NAME=VALUE", help="settings of TRL's SFTConfig in place of the attack's own")


def _grid(options: argparse.Namespace) -> dict[str, Any]:
    """What is tried under which limits, as `select` takes it."""
    given = {"targets": list(TARGETS), "limits": parse_limits([]), **parse_grid(options)}
    if options.attack_most is not None:
        given["attack_most"] = options.attack_most
    return given


def _attack(options: argparse.Namespace) -> "Attack | None":
    """The attack, with its rows loaded: a mistake in it shows before a model is."""
    if options.attack is None:
        return None
    from lox_hf.robustness.attacks.rows import get_attack, load_attack

    attack = get_attack(options.attack, sft=parse_settings("--sft", options.sft or []))
    load_attack(attack)
    return attack


def _short_attack(
    options: argparse.Namespace,
    attack: "Attack | None",
    measurement: "Measurement",
    tokenizer: "PreTrainedTokenizerBase",
) -> "ShortAttack | None":
    from lox_hf.auto.attack import ShortAttack

    if attack is None:
        return None
    return ShortAttack(attack, measurement, tokenizer, learning_rate=options.attack_lr, max_steps=options.attack_steps)


def _measures(
    options: argparse.Namespace,
    measurement: "Measurement",
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
) -> "CandidateMeasures":
    """What is measured of every candidate; the model is still the aligned one."""
    from lox_hf.auto.measures import CandidateMeasures
    from lox_hf.evaluation.data.prompts import load_prompts
    from lox_hf.evaluation.divergence import answer_reference

    prompts = load_prompts(options.kl_prompts) if options.kl_prompts else measurement.prompts
    harmless = [prompt.text for prompt in prompts if not prompt.harmful]
    if options.kl_prompts and not harmless:  # a file without labels: all of them are meant
        harmless = [prompt.text for prompt in prompts]
    if not harmless:
        return CandidateMeasures(measurement, tokenizer)
    reference = answer_reference(
        model,
        tokenizer,
        harmless if options.kl_prompts else harmless[:KL_PROMPTS],
        template=measurement.template,
        system_prompt=measurement.system_prompt,
        batch_size=measurement.batch_size,
    )
    return CandidateMeasures(measurement, tokenizer, reference)


def _config(options: argparse.Namespace, subspace: "SafetySubspace | None") -> LoxConfig:
    """What all candidates share: the saved directions' own settings, with what the options say."""
    from dataclasses import replace

    given: dict[str, Any] = {}
    if options.base_revision is not None:
        given["revision"] = options.base_revision
    if options.exclude_modules is not None:
        given["exclude_modules"] = parse_modules(options.exclude_modules)
    return replace(LoxConfig() if subspace is None else subspace.config, **given)
