"""Options out of a YAML file, read as they would be on the command line, and options that would do nothing."""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lox_hf.cli.options import RENAMED
from lox_hf.config import LoxConfig
from lox_hf.errors import ConfigError

BASE_60 = ("tag:yaml.org,2002:str", re.compile(r"[-+]?\d+(:\d+)+(\.\d*)?$"))
"""YAML reads 6:1.25 as a number to the base 60; a rank and an alpha are a text."""


def merge_file(options: argparse.Namespace, instead_of_model: str | None = None) -> argparse.Namespace:
    """Fill what the command line left open from the YAML file, and settle which model is meant.

    Args:
        options: Parsed command line.
        instead_of_model: An option that makes a model needless, such as "subspace".

    Returns:
        The same options, complete.

    Raises:
        ConfigError: If the file cannot be read, has an unknown key, or no model is named.
    """
    known = vars(options).keys() - {"func", "parser", "interrupted", "config", "model_position"}
    names = {flag.removeprefix("--").replace("-", "_"): name for name, flag in RENAMED.items()}
    for key, value in _read_yaml(options.config).items():
        name = str(key).replace("-", "_")
        name = name if name in known else names.get(name, name)
        if name not in known:
            raise ConfigError(f"{options.config} has an unknown key '{key}'; known are {sorted(known)}.")
        if getattr(options, name) is None:
            setattr(options, name, _typed(options.parser, name, value))
    if not hasattr(options, "model_position"):  # a command about several models
        return options
    if options.model and options.model_position and options.model != options.model_position:
        raise ConfigError(f"Two models are named, '{options.model_position}' and '{options.model}': name one.")
    options.model = options.model or options.model_position
    if not options.model and not (instead_of_model and getattr(options, instead_of_model)):
        raise ConfigError(
            "No model is named: put MODEL, a folder or a Hub id, first. An option that takes several values takes "
            "every word after it; --model MODEL works anywhere."
        )
    return options


def refuse_without(options: argparse.Namespace, needed: str, names: Sequence[str]) -> None:
    """Refuse options that do nothing without another one, or with it where it is written "not ...".

    Args:
        options: Complete options.
        needed: The option they belong to, such as "gsm8k" or "not endpoint".
        names: The options.

    Raises:
        ConfigError: If one is given and would be ignored.
    """
    other = needed.removeprefix("not ")
    if bool(getattr(options, other)) == (other == needed):
        return
    idle = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]
    if idle:
        word = "without" if other == needed else "with"
        raise ConfigError(f"{', '.join(idle)} would do nothing {word} --{other}: leave it out.")


def _typed(parser: argparse.ArgumentParser, name: str, value: Any) -> Any:
    """A value from the YAML file as the command line would have it."""
    if name in {field.name for field in fields(LoxConfig)}:  # typed by `make_config`
        return "full" if name == "r" and value is None else value
    action = next(action for action in parser._actions if action.dest == name)
    flag = action.option_strings[0]
    if isinstance(action.const, bool):
        if not isinstance(value, bool):
            raise ConfigError(f"{flag} must be true or false, got {value!r}.")
        return value or None
    if value is True and action.const:  # an option that may stand without a value
        return action.const
    several = isinstance(value, list)
    items = value if several else [value]
    if (several and action.nargs != "+") or any(isinstance(item, list | None) for item in items):
        raise ConfigError(f"{flag} takes {'values' if action.nargs == '+' else 'one value'}, got {value!r}.")
    read = action.type if callable(action.type) else str
    try:
        # As it would stand on the command line: YAML reads 7 as a number.
        parsed = [read(json.dumps(item) if isinstance(item, dict) else str(item)) for item in items]
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ConfigError(f"{flag} cannot be {value!r}: {error}.") from None
    if action.choices and not set(parsed) <= set(action.choices):
        raise ConfigError(f"{flag} must be one of {', '.join(map(str, action.choices))}, got {value!r}.")
    return parsed if action.nargs == "+" else parsed[0]


def _read_yaml(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    import yaml

    resolvers = {first: [BASE_60, *others] for first, others in yaml.SafeLoader.yaml_implicit_resolvers.items()}
    loader = type("Loader", (yaml.SafeLoader,), {"yaml_implicit_resolvers": resolvers})
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), loader) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"Cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"Cannot read {path}: expected keys and values, got {type(data).__name__}.")
    return data
