"""`lox-hf drift`: how far fine-tuning has moved a model off its safety directions."""

import argparse
import json
import math
from dataclasses import fields
from typing import TYPE_CHECKING

from lox_hf.cli.config_file import merge_file
from lox_hf.cli.options import METAVARS, add_model_options, add_subspace_option, make_config
from lox_hf.config import LoxConfig
from lox_hf.errors import ConfigError

if TYPE_CHECKING:
    from lox_hf.records import DriftReading, TensorDrift
    from lox_hf.subspace import SafetySubspace

DESCRIPTION = """Measure how much of the change that alignment made is still in a fine-tuned model: retention, and the
paper's R_ft and R_align as the reference's R_metrics script has them. Nothing is written."""
FIGURES = {
    "r_ft": "share of the model's change that lies within the directions",
    "r_align": "the same of the aligned model",
    "ratio": "r_ft / r_align, which falls as safety is lost",
    "retention": "how much of the safety component is left",
}
CAVEAT = """\
Retention is 1 for the aligned model, 1 + alpha after LoX and 0 where the component is erased. It may stay near 1
while answers turn unsafe, and LoX raises r_ft by construction, so a rise after LoX is no evidence: measure safety
with lox-hf asr."""
OF_THE_SUBSPACE = {"--r": "r", "--aligned-revision": "aligned_revision", "--base-revision": "revision"}
"""What saved directions settle themselves: option -> its name."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "drift", help="measure how far fine-tuning has moved a model", description=DESCRIPTION
    )
    add_model_options(parser, model="the fine-tuned model", output=argparse.SUPPRESS)
    parser.add_argument("--aligned-model", metavar="MODEL", help="the model that was fine-tuned: folder or Hub id")
    parser.add_argument("--aligned-revision", metavar="REV", help="its revision on the Hub")
    parser.add_argument(
        "--base-model",
        dest="base_model_name_or_path",
        metavar="MODEL",
        help="the model before alignment (default: the one that the aligned model names); without it and with "
        "--subspace only retention is read",
    )
    parser.add_argument("--base-revision", dest="revision", metavar="REV", help="its revision on the Hub")
    parser.add_argument(
        "--r", metavar=METAVARS["r"], help=f"directions of a matrix, the paper's k (default: {LoxConfig.r})"
    )
    parser.add_argument(
        "--target-modules",
        nargs="+",
        metavar=METAVARS["target_modules"],
        help="modules to read (default: every linear layer and the output head, as the reference)",
    )
    add_subspace_option(parser)
    parser.add_argument("--per-layer", action="store_true", default=None, help="every matrix too")
    # One YAML file serves this command and those that make the directions: their other settings are no mistake in it.
    parser.set_defaults(func=run, **dict.fromkeys(field.name for field in fields(LoxConfig)))


def run(options: argparse.Namespace) -> None:
    """Measure, and print the reading."""
    options = merge_file(options)
    _check(options)
    config = make_config(options)
    from lox_hf.training.monitor import read_drift

    subspace = _subspace(options, config)
    base = config.base_model_name_or_path
    if base is None and options.aligned_model and subspace.report.base:
        base = subspace.report.base.name_or_path
    reading = read_drift(
        options.model,
        subspace,
        base,
        target_modules=config.target_modules,
        revision=options.model_revision,
        trust_remote_code=bool(options.trust_remote_code),
        progressbar=False if options.json else None,
    )
    if options.json:
        record = json.loads(reading.to_json())
        kept = [*FIGURES, "tensors"] if options.per_layer else list(FIGURES)
        print(json.dumps({name: record[name] for name in kept}, indent=2))
        return
    print(_render(reading, per_layer=bool(options.per_layer), with_base=base is not None))


def _check(options: argparse.Namespace) -> None:
    """Refuse what contradicts itself or would do nothing."""
    if options.output:
        raise ConfigError("lox-hf drift writes nothing: leave --output out, and redirect what --json prints.")
    if bool(options.subspace) == bool(options.aligned_model):
        given = "both are given" if options.subspace else "neither is given"
        raise ConfigError(
            "The directions come from one place: name the aligned model with --aligned-model, or directions that "
            f"lox-hf subspace saved with --subspace; {given}."
        )
    idle = [flag for flag, name in OF_THE_SUBSPACE.items() if options.subspace and getattr(options, name) is not None]
    if idle:
        raise ConfigError(f"{', '.join(idle)} would do nothing with --subspace: leave it out.")


def _subspace(options: argparse.Namespace, config: LoxConfig) -> "SafetySubspace":
    from lox_hf.subspace import SafetySubspace

    if options.subspace:
        return SafetySubspace.from_pretrained(options.subspace)
    return SafetySubspace.from_models(
        options.aligned_model,
        config=config,
        revision=options.aligned_revision,
        trust_remote_code=bool(options.trust_remote_code),
        progressbar=False if options.json else None,
    )


def _render(reading: "DriftReading", *, per_layer: bool, with_base: bool) -> str:
    """The figures, each with what it is, and every matrix where asked for."""
    from lox_hf.evaluation.report import render_text

    names = list(FIGURES) if with_base else ["retention"]
    parts = ["\n".join(f"{name:<9}  {_number(getattr(reading, name)):>7}  {FIGURES[name]}" for name in names)]
    if per_layer:
        columns = [name for name in names if name != "ratio"]
        rows = [("matrix", *columns), *(_row(drift, columns) for drift in reading.tensors)]
        parts.append(render_text(rows))
    matrices = f"Read over {len(reading.tensors)} matrices{'' if with_base else '; r_ft needs --base-model'}."
    return "\n\n".join([*parts, f"{matrices}\n{CAVEAT}"])


def _row(drift: "TensorDrift", columns: list[str]) -> tuple[str, ...]:
    return (drift.name, *(_number(getattr(drift, name)) for name in columns))


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
