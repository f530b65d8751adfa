"""The `lox-hf` command."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from lox_hf.cli import (
    adapter,
    asr,
    auto,
    demo,
    drift,
    harden,
    landscape,
    layers,
    plot,
    push,
    push_metric,
    rank_curve,
    select,
    stress,
    subspace,
    utility,
    verify,
)
from lox_hf.errors import LoxError
from lox_hf.version import __version__

COMMANDS = (
    auto,
    harden,
    adapter,
    subspace,
    layers,
    drift,
    rank_curve,
    select,
    landscape,
    asr,
    utility,
    stress,
    plot,
    push,
    push_metric,
    verify,
    demo,
)


def main(arguments: Sequence[str] | None = None, prog: str = "lox-hf") -> int:
    """Run one command.

    Args:
        arguments: Words of the command line; None takes those of the process.
        prog: What the command is called.

    Returns:
        Exit code: 0, or 2 for a mistake that the message explains.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Harden safety-aligned language models against losing their safety in fine-tuning (LoX).",
        epilog="LoX raises the cost of losing safety, it does not make a model safe. Measure before you publish.",
    )
    parser.add_argument("--version", action="version", version=f"{prog} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    for parsed in commands.choices.values():
        parsed.set_defaults(parser=parsed, interrupted=parsed.get_default("interrupted") or "nothing was published")
    options = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _teller(prog)
            return options.func(options) or 0
    except LoxError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted, {options.interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has enough of it; at exit Python would flush into the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _teller(prog: str) -> Callable[..., None]:
    """Shows a warning for users as one line, once, however often it is given; the others are for who writes code."""
    told = set()

    def tell(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning) and str(message) not in told:
            told.add(str(message))
            print(f"{prog}: warning: {message}", file=sys.stderr)

    return tell
