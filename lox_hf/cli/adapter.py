"""`lox-hf adapter`: the hardening as a PEFT LoRA adapter."""

import argparse
from pathlib import Path

from lox_hf.cli.config_file import merge_file
from lox_hf.cli.options import (
    add_config_options,
    add_input_options,
    add_subspace_option,
    call_options,
    default_output,
    describe,
    make_config,
)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "adapter",
        help="write the hardening as a PEFT LoRA adapter",
        description="Write the hardening as an exact LoRA adapter for the aligned model, which stock PEFT loads.",
    )
    add_input_options(parser)
    add_subspace_option(parser)
    add_config_options(parser)
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> None:
    """Write the adapter, and say how to load it."""
    options = merge_file(options)
    config = make_config(options)
    output = Path(options.output) if options.output else default_output(options.model, "lox-adapter")
    from lox_hf.adapter import extract_lox_adapter
    from lox_hf.harden import plan_hardening

    common = call_options(options)
    if not options.json:
        plan = plan_hardening(options.model, config, output_dir=output, **common)
        print(describe(options, config, plan, output) + "\n", flush=True)
    report = extract_lox_adapter(options.model, output, config, progressbar=False if options.json else None, **common)
    if options.json:
        print(report.to_json())
        return
    parameters = sum((item.shape[0] + item.shape[1]) * item.rank for item in report.tensors)
    print(
        f"{sum(item.rank > 0 for item in report.tensors)} matrices, {parameters:,} parameters, "
        f"in {report.seconds:.1f} s.\n"
        f"The directions hold {report.energy_share:.1%} of the change alignment made.\n"
        f'Written to {output}: load it with PeftModel.from_pretrained(model, "{output}") on the aligned model.\n'
        "LoX raises the cost of losing safety, it does not make a model safe: measure before you publish."
    )
