"""Options that commands share; those of `LoxConfig` are made from its fields and its docstring."""

import argparse
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from lox_hf.cli.words import parse_words
from lox_hf.config import ALL_LINEAR, REGEX_SIGNS, LoxConfig
from lox_hf.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lox_hf.records import HardeningPlan
    from lox_hf.subspace import SafetySubspace

RENAMED = {"base_model_name_or_path": "--base-model", "revision": "--base-revision"}
SOURCES = {
    "r": "the paper's main setting, LLaMA-2-7B",
    "alpha": "the paper's main setting, LLaMA-2-7B",
    "target_modules": "every tensor with two or more dims, as the reference does",
}
OTHER_SETTINGS = (
    "exclude_modules",
    "layers_to_transform",
    "rank_pattern",
    "alpha_pattern",
    "svd",
    "svd_tol",
    "cast_base",
)
METAVARS = {
    "r": "N|SHARE|full",
    "alpha": "ALPHA",
    "svd": "auto|exact",
    "layers_to_transform": "N|A-B",
    "rank_pattern": "NAME=R",
    "alpha_pattern": "NAME=ALPHA",
    "target_modules": "NAME",
    "exclude_modules": "NAME",
}


class CallOptions(TypedDict):
    """Arguments that planning and doing share."""

    revision: str | None
    trust_remote_code: bool
    allow_repeat: bool
    base_model: "SafetySubspace | None"


def add_model_options(parser: argparse.ArgumentParser, *, model: str, output: str) -> None:
    """Add what every command takes: a model, an output, a file of options.

    Args:
        parser: The command's parser.
        model: Help for the model.
        output: Help for the output.
    """
    parser.add_argument("model_position", nargs="?", metavar="MODEL", help=f"{model}: folder or Hub id")
    parser.add_argument("--model", metavar="MODEL", help="the same, as an option")
    parser.add_argument("--model-revision", metavar="REV", help=f"revision of {model} on the Hub")
    add_common_options(parser, output=output)


def add_common_options(parser: argparse.ArgumentParser, *, output: str) -> None:
    """Add what every command takes, whatever models it is about: an output, and a file of options.

    Args:
        parser: The command's parser.
        output: Help for the output.
    """
    parser.add_argument("--output", metavar="DIR", help=output)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these options; the command line wins")
    parser.add_argument(
        "--trust-remote-code", action="store_true", default=None, help="run code of the model's repository"
    )
    parser.add_argument("--json", action="store_true", default=None, help="print the record as JSON and nothing else")


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the models and say how to run."""
    add_model_options(parser, model="the aligned model", output="folder to create (default: named after the model)")
    parser.add_argument(
        "--allow-repeat", action="store_true", default=None, help="accept a model that is hardened already"
    )


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add where the work is done."""
    parser.add_argument(
        "--device",
        metavar="auto|cpu|cuda|cuda:N",
        help="where directions are found and added (default: auto, the accelerator where there is one, else the CPU)",
    )


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add one option per field of `LoxConfig`, with the field's own words as help."""
    group = parser.add_argument_group("settings (LoxConfig)")
    helps = _docstring_arguments()
    for field in fields(LoxConfig):
        flag = RENAMED.get(field.name, "--" + field.name.replace("_", "-"))
        text = helps[field.name].replace("%", "%%")
        if field.default is False:
            group.add_argument(flag, dest=field.name, action="store_true", default=None, help=text)
            continue
        default = "" if field.default in (None, MISSING) else f" (default: {field.default})"
        several = "+" if field.name.endswith(("_modules", "_pattern", "_transform")) else None
        group.add_argument(
            flag, dest=field.name, metavar=METAVARS.get(field.name, "VALUE"), help=text + default, nargs=several
        )


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Add how a model is loaded that is run and not only edited."""
    parser.add_argument("--batch-size", type=int, metavar="N", help="how many at once (default: what fits)")
    parser.add_argument("--dtype", metavar="DTYPE", help="dtype to load in (default: the checkpoint's)")
    parser.add_argument("--device", metavar="DEVICE", help="device (default: the accelerator, else the CPU)")
    parser.set_defaults(interrupted="what was done is kept: the same command goes on")


def load_for_running(options: argparse.Namespace) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load the model that the options name, with its tokenizer."""
    from lox_hf.evaluation.models.loading import load_model

    return load_model(
        options.model,
        revision=options.model_revision,
        dtype=options.dtype or "auto",
        device=options.device,
        trust_remote_code=bool(options.trust_remote_code),
    )


def add_base_options(parser: argparse.ArgumentParser) -> None:
    """Add the base of a command that measures models, and directions that are known already."""
    add = parser.add_argument
    add("--base-model", metavar="MODEL", help="the model before alignment (default: the one the aligned model names)")
    add("--base-revision", metavar="REV", help="revision of the base on the Hub")
    add("--subspace", metavar="DIR", help="directions that lox-hf subspace saved, instead of finding them")


def saved_subspace(options: argparse.Namespace) -> "SafetySubspace | None":
    """Load the directions that the options name; None where they name none."""
    from lox_hf.subspace import SafetySubspace

    return None if options.subspace is None else SafetySubspace.from_pretrained(options.subspace)


def add_subspace_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that takes saved directions in place of a base."""
    parser.add_argument("--subspace", metavar="DIR", help="directions that lox-hf subspace saved, in place of a base")


def call_options(options: argparse.Namespace) -> "CallOptions":
    """What planning and doing are both told."""
    return {
        "revision": options.model_revision,
        "trust_remote_code": bool(options.trust_remote_code),
        "allow_repeat": bool(options.allow_repeat),
        "base_model": saved_subspace(options),
    }


def make_config(options: argparse.Namespace) -> LoxConfig:
    """Build the config from the options that were given; the rest keeps its defaults.

    Args:
        options: Complete options.

    Returns:
        The config.

    Raises:
        ConfigError: If a value cannot be understood or is out of range.
    """
    given = {field.name: getattr(options, field.name) for field in fields(LoxConfig)}
    return LoxConfig(**{name: _value(name, value) for name, value in given.items() if value is not None})


def describe(options: argparse.Namespace, config: LoxConfig, plan: "HardeningPlan", output: Path | str) -> str:
    """Lines that say what will be done, and where each default comes from."""

    def setting(name: str, shown: object) -> str:
        return f"{shown}" if getattr(options, name) is not None else f"{shown} (default: {SOURCES[name]})"

    base = plan.base.name_or_path if plan.base else "not needed: the adapter is the change alignment made"
    if plan.base_found_in == "subspace":
        base += " (from the subspace)"
    elif plan.is_from_config:
        base += " (not read: all of it is taken to be like the aligned model's)"
    elif plan.base and plan.base_found_in != "config":
        base += f" (named by {plan.base_found_in} of the aligned model)"
    named_output = "" if options.output or getattr(options, "push_to", None) else " (named after the aligned model)"
    rows = {
        "aligned": f"{options.model}{' (planned from config.json alone: no weights are there)' * plan.is_from_config}",
        "base": base,
        "r": setting("r", "full rank" if config.r is None else config.r),
        "alpha": setting("alpha", config.alpha),
        "targets": setting("target_modules", config.target_modules or "all"),
        **{name: given for name in OTHER_SETTINGS if (given := getattr(config, name)) != getattr(LoxConfig, name)},
        "output": f"{output}{named_output}",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def default_output(model: str, suffix: str) -> Path:
    """Folder in the current directory, named after the model."""
    return Path(f"{Path(model).expanduser().resolve().name if Path(model).is_dir() else Path(model).name}-{suffix}")


def _docstring_arguments() -> dict[str, str]:
    text = (LoxConfig.__doc__ or "").split("    Args:\n")[1].split("\n    Raises:")[0]
    entries = re.split(r"\n? {8}(\w+): ", text)[1:]
    return {name: " ".join(body.split()) for name, body in zip(entries[::2], entries[1::2], strict=True)}


def _value(name: str, value: Any) -> Any:
    """Turn words of the command line into a field's value; values from YAML are typed already."""
    if name == "r":
        return parse_rank(value)
    if name in ("alpha", "svd_tol"):
        return _number(name, value, float)
    if name == "seed":
        return _number(name, value, int)
    if name in ("target_modules", "exclude_modules"):
        return parse_modules(value)
    if name == "layers_to_transform":
        return _layers(value)
    if name in ("rank_pattern", "alpha_pattern"):
        return _patterns(name, value)
    return value


def parse_rank(value: Any) -> int | float | None:
    """Rank as the command line takes it: "6", "0.9", "full", or the reference's "0" for the full rank.

    Args:
        value: A word, or a number from YAML.

    Returns:
        The value for `LoxConfig.r`.

    Raises:
        ConfigError: If it is none of these.
    """
    text = str(value).lower()
    if text in ("full", "none", "0"):
        return None
    return _number("r", value, int if re.fullmatch(r"[-+]?\d+", text) else float)


def _number(name: str, value: Any, kind: type) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise ConfigError(f"--{name.replace('_', '-')} must be a number, got '{value}'.") from None


def parse_modules(value: Any) -> list[str] | str:
    """Modules as the command line takes them: a regular expression, or names separated by spaces or commas.

    Args:
        value: A word or several, or what YAML made of them.

    Returns:
        The value for `LoxConfig.target_modules`: text for "all-linear" and for a single expression, else a list.
    """
    items = value if isinstance(value, list) else [value]
    if len(items) == 1 and (items[0] == ALL_LINEAR or REGEX_SIGNS.search(str(items[0]))):
        return str(items[0])
    return parse_words(value)


def _layers(value: Any) -> list[int]:
    """Numbers and ranges: "0 1 2", "0,1,2" or "4-8"."""
    layers = []
    for word in parse_words(value):
        first, _, last = word.partition("-")
        if not first.isdigit() or (last and not last.isdigit()) or int(last or first) < int(first):
            raise ConfigError(f"--layers-to-transform takes numbers and ranges such as 0,1,4-8, got '{word}'.")
        layers += range(int(first), int(last or first) + 1)
    return layers


def _patterns(name: str, value: Any) -> dict[str, Any]:
    """NAME=VALUE pairs."""
    pairs: dict[str, Any] = {}
    if isinstance(value, dict):
        pairs = value
    else:
        for word in value if isinstance(value, list) else [value]:
            key, sign, number = str(word).rpartition("=")
            if not sign or not key:
                raise ConfigError(f"--{name.replace('_', '-')} takes NAME=VALUE, got '{word}'.")
            pairs[key] = number
    parse = parse_rank if name == "rank_pattern" else lambda number: _number(name, number, float)
    return {key: parse(number) for key, number in pairs.items()}
