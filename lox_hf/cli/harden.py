"""`lox-hf harden`: a hardened checkpoint, disk to disk."""

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from lox_hf.cli.config_file import merge_file, refuse_without
from lox_hf.cli.options import (
    add_config_options,
    add_device_option,
    add_input_options,
    add_subspace_option,
    call_options,
    default_output,
    describe,
    make_config,
)
from lox_hf.cli.plan_table import estimate_table, plan_table
from lox_hf.errors import ConfigError

if TYPE_CHECKING:
    from lox_hf.config import LoxConfig
    from lox_hf.parallel.ranks import Ranks
    from lox_hf.records import HardeningPlan, HardeningReport

    Route: TypeAlias = tuple[Callable[..., HardeningPlan], Callable[..., HardeningReport], Path | str]


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "harden",
        help="write a hardened checkpoint",
        description="Write a hardened checkpoint: W + alpha * Proj_r(W - W_base), disk to disk in constant memory.",
        epilog="Several processes, on one machine or more that share a file system, do it together: "
        "torchrun --nproc_per_node 8 -m lox_hf.cli -- harden ... (the -- keeps torchrun from taking --r for its own).",
    )
    add_input_options(parser)
    add_subspace_option(parser)
    add_device_option(parser)
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
    parser.add_argument(
        "--dry-run",
        action="store_true",
        default=None,
        help="print the plan and what it takes, write nothing; of the model its config.json is enough",
    )
    add_config_options(parser)
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> None:
    """Harden, and print the report; of several processes the first one speaks for all."""
    from lox_hf.parallel.ranks import join_ranks

    options = merge_file(options)
    config = make_config(options)
    with join_ranks() as ranks:
        if options.dry_run:
            _show_plan(options, config, ranks)
        else:
            _harden(options, config, ranks)


def _show_plan(options: argparse.Namespace, config: "LoxConfig", ranks: "Ranks") -> None:
    """Print the plan with what it takes, and end in the error that doing it would meet at its output."""
    from lox_hf.estimate import estimate
    from lox_hf.parallel.device import resolve_device

    plan_it, _, output = _route(options, config, ranks)
    resolve_device(options.device)
    plan = plan_it()
    if plan.base is not None:  # an adapter's factors take no time
        ranks.gather(None)  # all at once, so that they slow each other as they will in the work
        plan = replace(plan, estimate=estimate(plan, config, processes=ranks.size))
    if not ranks.is_first:
        return
    parts = [describe(options, config, plan, output), plan_table(plan)]
    if plan.estimate is not None:
        parts.append(estimate_table(plan, plan.estimate, to_hub=bool(options.push_to)))
    print(plan.to_json() if options.json else "\n\n".join(parts), flush=True)
    if isinstance(output, Path) and not plan.is_from_config:
        _check_output(output, plan)


def _check_output(output: Path, plan: "HardeningPlan") -> None:
    """Refuse an output that could not be written."""
    from lox_hf.weights.writer import FolderWriter

    sides = [Path(side.name_or_path).expanduser() for side in (plan.aligned, plan.base) if side is not None]
    FolderWriter(output).check(plan.total_bytes, [side for side in sides if side.is_dir()])


def _harden(options: argparse.Namespace, config: "LoxConfig", ranks: "Ranks") -> None:
    """Print what will be done, do it, and print the report."""
    plan_it, harden_it, output = _route(options, config, ranks)
    speaks = ranks.is_first and not options.json
    if speaks:
        print(describe(options, config, plan_it(), output), flush=True)
    report = harden_it(progressbar=None if speaks else False)
    if speaks:
        print(f"\n{report_summary(report, load_from=options.push_to)}")
    elif ranks.is_first:
        print(report.to_json())


def _route(options: argparse.Namespace, config: "LoxConfig", ranks: "Ranks") -> "Route":
    return _hub(options, config, ranks) if options.push_to else _folder(options, config, ranks)


def _folder(options: argparse.Namespace, config: "LoxConfig", ranks: "Ranks") -> "Route":
    """To a folder on this machine."""
    refuse_without(options, "push_to", ("public", "work_dir"))
    from lox_hf.harden import harden_checkpoint, plan_hardening

    output = Path(options.output) if options.output else default_output(options.model, "lox")
    common = call_options(options)
    planned = None if options.dry_run else output
    return (
        partial(plan_hardening, options.model, config, output_dir=planned, **common),
        partial(harden_checkpoint, options.model, output, config, ranks=ranks, device=options.device, **common),
        output,
    )


def _hub(options: argparse.Namespace, config: "LoxConfig", ranks: "Ranks") -> "Route":
    """Straight to the Hub."""
    if options.output is not None:
        raise ConfigError("--output and --push-to are two places for one result: choose one.")
    if options.device is not None:
        raise ConfigError("--push-to works on the CPU, since the line is slower than it: leave --device out.")
    if ranks.size > 1:
        raise ConfigError("--push-to works in one process: harden into a folder with torchrun, then lox-hf push.")
    from lox_hf.hub.stream import harden_to_hub, plan_to_hub

    common = {**call_options(options), "work_dir": options.work_dir, "private": not options.public}
    return (
        partial(plan_to_hub, options.model, options.push_to, config, **common),
        partial(harden_to_hub, options.model, options.push_to, config, **common),
        f"'{options.push_to}' on the Hub",
    )


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
