"""`lox-hf layers`: where in a model the change lies that alignment made."""

import argparse
import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from lox_hf.cli.cells import known
from lox_hf.cli.config_file import merge_file, refuse_without
from lox_hf.cli.options import METAVARS, add_model_options, add_subspace_option, default_output, make_config
from lox_hf.config import LoxConfig
from lox_hf.errors import ConfigError

if TYPE_CHECKING:
    from lox_hf.records import DriftReading, LayerMap, LayerSummary
    from lox_hf.subspace import SafetySubspace

DESCRIPTION = """Show where in a model the change lies that alignment made: by layer and kind of matrix its share, how
much of it the directions hold, the singular values, and with --tuned how much of it a fine-tuned model has kept.
Writes layers.json, layers.png and layers.svg."""
CAVEAT = """\
Where the change is large is not where safety lives: in the demonstration no matrix changed more than the output
head, and hardening it adds nothing to robustness. Harden parts of a model and attack them to know: lox-hf select."""
STEM = "layers"
MOST_LAYERS = 12
OF_THE_MODELS = {
    "MODEL": "model",
    "--model-revision": "model_revision",
    "--base-model": "base_model_name_or_path",
    "--base-revision": "revision",
    "--r": "r",
    "--target-modules": "target_modules",
}
"""What saved directions settle themselves: option -> its name."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "layers", help="show in which layers the change lies that alignment made", description=DESCRIPTION
    )
    add_model_options(parser, model="the aligned model", output="folder (default: named after the model)")
    add = parser.add_argument
    add("--base-model", dest="base_model_name_or_path", metavar="MODEL", help="the model before alignment")
    add("--base-revision", dest="revision", metavar="REV", help="its revision on the Hub")
    add("--r", metavar=METAVARS["r"], help=f"directions of a matrix, the paper's k (default: {LoxConfig.r})")
    add(
        "--target-modules",
        nargs="+",
        metavar=METAVARS["target_modules"],
        help="modules to show (default: every tensor with two or more dims)",
    )
    add_subspace_option(parser)
    add("--tuned", metavar="MODEL", help="a fine-tuned model, whose retention is shown too: folder or Hub id")
    add("--tuned-revision", metavar="REV", help="its revision on the Hub")
    # One YAML file serves this command and those that make the directions: their other settings are no mistake in it.
    parser.set_defaults(func=run, **dict.fromkeys(field.name for field in fields(LoxConfig)))


def run(options: argparse.Namespace) -> None:
    """Write the map and its figure, and print it by kind and by layer."""
    options = merge_file(options, instead_of_model="subspace")
    idle = [flag for flag, name in OF_THE_MODELS.items() if options.subspace and getattr(options, name) is not None]
    if idle:
        raise ConfigError(f"{', '.join(idle)} would do nothing with --subspace: leave it out.")
    refuse_without(options, "tuned", ("tuned_revision",))
    output = Path(options.output) if options.output else default_output(options.model or options.subspace, STEM)
    from lox_hf.analysis.layers import layer_map, where_most_lies
    from lox_hf.plots.layers import draw_layer_map
    from lox_hf.plots.style import check_matplotlib, save_figure
    from lox_hf.weights.output_file import output_errors

    check_matplotlib()
    subspace = _subspace(options)
    found = layer_map(subspace, _reading(options, subspace), options.tuned or "")
    figure = draw_layer_map(found)  # before anything is written
    with output_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        (output / f"{STEM}.json").write_text(found.to_json(), encoding="utf-8")
    save_figure(figure, output / STEM)
    if options.json:
        print(found.to_json(), end="")
        return
    print(_render(found, where_most_lies(found)))
    print(f"Written to {output}: {STEM}.json, {STEM}.png, {STEM}.svg.")


def _subspace(options: argparse.Namespace) -> "SafetySubspace":
    from lox_hf.subspace import SafetySubspace

    if options.subspace:
        return SafetySubspace.from_pretrained(options.subspace)
    return SafetySubspace.from_models(
        options.model,
        config=make_config(options),
        revision=options.model_revision,
        trust_remote_code=bool(options.trust_remote_code),
        progressbar=False if options.json else None,
    )


def _reading(options: argparse.Namespace, subspace: "SafetySubspace") -> "DriftReading | None":
    """Retention of every matrix that has directions, embeddings included."""
    if not options.tuned:
        return None
    from lox_hf.training.monitor import read_drift
    from lox_hf.weights.selection import module_name

    modules = {module_name(re.sub(r"\[\d+\]$", "", name)) for name in subspace.factors}
    return read_drift(
        options.tuned,
        subspace,
        target_modules="|".join(map(re.escape, sorted(modules))),
        revision=options.tuned_revision,
        trust_remote_code=bool(options.trust_remote_code),
        progressbar=False if options.json else None,
    )


def _render(found: "LayerMap", words: str) -> str:
    """Kinds and layers as tables, and what they say."""
    from lox_hf.evaluation.report import render_text

    layers = {("outside" if layer is None else str(layer)): item for layer, item in found.by_layer().items()}
    shown = sorted(layers, key=lambda name: -layers[name].change_share)[:MOST_LAYERS]
    kept = {name: item for name, item in layers.items() if name in shown}
    left = len(layers) - len(kept)
    more = f"\n{left} more layers changed less; {STEM}.json has all." if left else ""
    tables = [render_text([_header(found, "kind"), *(_row(found, *item) for item in found.by_kind().items())])]
    tables.append(render_text([_header(found, "layer"), *(_row(found, *item) for item in kept.items())]) + more)
    return "\n\n".join([*tables, f"{words}\n{CAVEAT}"])


def _header(found: "LayerMap", first: str) -> tuple[str, ...]:
    retention = ("retention",) if found.tuned else ()
    return (first, "matrices", "share of the change", f"held by r = {found.r}", "largest s_1", *retention)


def _row(found: "LayerMap", name: str, item: "LayerSummary") -> tuple[str, ...]:
    figures = [(item.change_share, ".1%"), (item.energy_share, ".1%"), (item.s_1, ".3g")]
    figures += [(item.retention, ".3f")] if found.tuned else []
    return (name, str(item.matrices), *(known(value, form, otherwise="-") for value, form in figures))
