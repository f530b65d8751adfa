"""`lox-hf subspace`: the directions as an artefact."""

import argparse
from pathlib import Path

from lox_hf.cli.config_file import merge_file
from lox_hf.cli.options import (
    add_config_options,
    add_device_option,
    add_input_options,
    default_output,
    make_config,
)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "subspace",
        help="save the directions, so that another alpha costs no decomposition",
        description="Save U, S, Vh of the change alignment made to every matrix as one safetensors artefact.",
    )
    add_input_options(parser)
    add_device_option(parser)
    add_config_options(parser)
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> None:
    """Save the subspace, and say how to use it."""
    options = merge_file(options)
    config = make_config(options)
    output = Path(options.output) if options.output else default_output(options.model, "lox-subspace")
    from lox_hf.subspace import SafetySubspace
    from lox_hf.weights.writer import FolderWriter

    FolderWriter(output).check(0, [])  # before the work, and not only after it
    subspace = SafetySubspace.from_models(
        options.model,
        config=config,
        revision=options.model_revision,
        trust_remote_code=bool(options.trust_remote_code),
        device=options.device or "auto",
        progressbar=False if options.json else None,
    )
    subspace.save_pretrained(output)
    report = subspace.report
    if options.json:
        print(report.to_json())
        return
    print(
        f"{len(subspace.factors)} matrices decomposed in {report.seconds:.1f} s: {subspace!r}.\n"
        f"The directions hold {report.energy_share:.1%} of the change alignment made.\n"
        f'Written to {output}: pass base_model=SafetySubspace.from_pretrained("{output}") to apply_lox.'
    )
