"""The `lox-hf` command."""

import argparse
import sys
from collections.abc import Sequence

from lox_hf.cli import adapter, asr, demo, harden, subspace, utility
from lox_hf.errors import LoxError
from lox_hf.version import __version__

COMMANDS = (harden, adapter, subspace, asr, utility, demo)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Words of the command line; None takes those of the process.

    Returns:
        Exit code: 0, or 2 for a mistake that the message explains.
    """
    parser = argparse.ArgumentParser(
        prog="lox-hf",
        description="Harden safety-aligned language models against losing their safety in fine-tuning (LoX).",
        epilog="LoX raises the cost of losing safety, it does not make a model safe. Measure before you publish.",
    )
    parser.add_argument("--version", action="version", version=f"lox-hf {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        return options.func(options) or 0
    except LoxError as error:
        print(f"lox-hf: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lox-hf: interrupted, nothing was published", file=sys.stderr)
        return 130
