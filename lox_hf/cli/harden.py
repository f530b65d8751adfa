"""`lox-hf harden`: a hardened checkpoint, disk to disk."""

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from lox_hf.cli.config_file import merge_file, refuse_without
from lox_hf.cli.options import (
    add_config_options,
    add_input_options,
    add_subspace_option,
    call_options,
    default_output,
    describe,
    make_config,
)
from lox_hf.errors import ConfigError

if TYPE_CHECKING:
    from lox_hf.config import LoxConfig
    from lox_hf.records import HardeningPlan, HardeningReport

    Route: TypeAlias = tuple[Callable[..., HardeningPlan], Callable[..., HardeningReport], Path | str]


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "harden",
        help="write a hardened checkpoint",
        description="Write a hardened checkpoint: W + alpha * Proj_r(W - W_base), disk to disk in constant memory.",
    )
    add_input_options(parser)
    add_subspace_option(parser)
    parser.add_argument(
        "--push-to",
        metavar="REPO_ID",
        help="publish to this Hub repository in place of a folder, shard by shard: models on the Hub that are not in "
        "its cache are read tensor by tensor, and at most two shards lie on this disk at any time",
    )
    parser.add_argument(
        "--public", action="store_true", default=None, help="with --push-to: make a new repository public"
    )
    parser.add_argument(
        "--work-dir", metavar="DIR", help="with --push-to: folder for the shard in work (default: TMPDIR)"
    )
    parser.add_argument("--dry-run", action="store_true", default=None, help="print the plan, write nothing")
    add_config_options(parser)
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> None:
    """Harden, and print the report."""
    options = merge_file(options)
    config = make_config(options)
    plan_it, harden_it, output = _hub(options, config) if options.push_to else _folder(options, config)
    plan = plan_it()
    about = describe(options, config, plan, output)
    if options.dry_run:
        print(plan.to_json() if options.json else f"{about}\n\n{plan_table(plan)}")
        return
    if not options.json:
        print(about, flush=True)
    report = harden_it(progressbar=False if options.json else None)
    print(report.to_json() if options.json else f"\n{report_summary(report, load_from=options.push_to)}")


def _folder(options: argparse.Namespace, config: "LoxConfig") -> "Route":
    """To a folder on this machine."""
    refuse_without(options, "push_to", ("public", "work_dir"))
    from lox_hf.harden import harden_checkpoint, plan_hardening

    output = Path(options.output) if options.output else default_output(options.model, "lox")
    common = call_options(options)
    planned = None if options.dry_run else output
    return (
        partial(plan_hardening, options.model, config, output_dir=planned, **common),
        partial(harden_checkpoint, options.model, output, config, **common),
        output,
    )


def _hub(options: argparse.Namespace, config: "LoxConfig") -> "Route":
    """Straight to the Hub."""
    if options.output is not None:
        raise ConfigError("--output and --push-to are two places for one result: choose one.")
    from lox_hf.hub.stream import harden_to_hub, plan_to_hub

    common = {**call_options(options), "work_dir": options.work_dir, "private": not options.public}
    return (
        partial(plan_to_hub, options.model, options.push_to, config, **common),
        partial(harden_to_hub, options.model, options.push_to, config, **common),
        f"'{options.push_to}' on the Hub",
    )


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


def report_summary(report: "HardeningReport", *, load_from: str | None = None) -> str:
    """The report in a few lines; `load_from` is where the model is loaded from, if not from the output itself."""
    changed = [item for item in report.tensors if item.rank]
    share = report.energy_share
    lines = [
        f"{len(changed)} matrices hardened, {len(report.tensors) - len(changed) + report.copied} left as they were, "
        f"in {report.seconds:.1f} s.",
        "The directions hold "
        + ("an unknown share" if math.isnan(share) else f"{share:.1%}")
        + " of the change alignment made.",
        f"Written to {report.output}: load it with "
        f'AutoModelForCausalLM.from_pretrained("{load_from or report.output}").',
        "LoX raises the cost of losing safety, it does not make a model safe: measure before you publish.",
    ]
    return "\n".join(lines + [f"Note: {text}" for text in report.warnings])
