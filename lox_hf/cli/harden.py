"""`lox-hf harden`: a hardened checkpoint, disk to disk."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from lox_hf.records import HardeningPlan, HardeningReport


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "harden",
        help="write a hardened checkpoint",
        description="Write a hardened checkpoint: W + alpha * Proj_r(W - W_base), disk to disk in constant memory.",
    )
    add_input_options(parser)
    add_subspace_option(parser)
    parser.add_argument("--dry-run", action="store_true", default=None, help="print the plan, write nothing")
    add_config_options(parser)
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> None:
    """Harden, and print the report."""
    options = merge_file(options)
    config = make_config(options)
    output = Path(options.output) if options.output else default_output(options.model, "lox")
    from lox_hf.harden import harden_checkpoint, plan_hardening

    common = call_options(options)
    plan = plan_hardening(options.model, config, output_dir=None if options.dry_run else output, **common)
    about = describe(options, config, plan, output)
    if options.dry_run:
        print(plan.to_json() if options.json else f"{about}\n\n{plan_table(plan)}")
        return
    if not options.json:
        print(about, flush=True)
    report = harden_checkpoint(options.model, output, config, progressbar=False if options.json else None, **common)
    print(report.to_json() if options.json else f"\n{report_summary(report)}")


def plan_table(plan: "HardeningPlan") -> str:
    """The plan, a line per tensor."""
    width = max(len(tensor.name) for tensor in plan.tensors)
    rows = [
        f"{tensor.name:<{width}}  {tensor.shape!s:<16}  {tensor.dtype:<9}  "
        + (
            f"r {'full' if tensor.r is None else tensor.r}, alpha {tensor.alpha}"
            if tensor.edit
            else f"copied: {tensor.reason}"
        )
        for tensor in plan.tensors
    ]
    edited = len(plan.edited)
    rows.append(
        f"\n{edited} tensors to edit, {len(plan.tensors) - edited} to copy, {plan.total_bytes / 1e9:.3f} GB. "
        "Nothing was written."
    )
    return "\n".join(rows + [f"Not copied: {', '.join(plan.left_out)}"] * bool(plan.left_out))


def report_summary(report: "HardeningReport") -> str:
    """The report in a few lines."""
    changed = [item for item in report.tensors if item.rank]
    share = report.energy_share
    lines = [
        f"{len(changed)} matrices hardened, {len(report.tensors) - len(changed) + report.copied} left as they were, "
        f"in {report.seconds:.1f} s.",
        "The directions hold "
        + ("an unknown share" if math.isnan(share) else f"{share:.1%}")
        + " of the change alignment made.",
        f'Written to {report.output}: load it with AutoModelForCausalLM.from_pretrained("{report.output}").',
        "LoX raises the cost of losing safety, it does not make a model safe: measure before you publish.",
    ]
    return "\n".join(lines + [f"Note: {text}" for text in report.warnings])
