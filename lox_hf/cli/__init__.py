"""The command line: every command parses, calls one function, and prints its record."""

from lox_hf.cli.main import main

__all__ = ["main"]
