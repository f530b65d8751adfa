"""Commands of `lox-hf` as a reader would type them, with the time that they take."""

from __future__ import annotations

import contextlib
import io
import json
import time
from typing import Any

from lox_hf.cli.main import main as lox_hf


def run_command(*words: object) -> dict[str, Any]:
    """Run a `lox-hf` command with --json and return its record; in this process, which saves the imports.

    Args:
        words: The command and its options; each as text.

    Raises:
        SystemExit: If the command fails; it has said why.
    """
    command = [str(word) for word in words]
    with Timer("lox-hf " + " ".join(command)), contextlib.redirect_stdout(io.StringIO()) as printed:
        status = lox_hf([*command, "--json"])
    if status:
        raise SystemExit(status)
    return json.loads(printed.getvalue())


class Timer:
    """Print what ran, and how long it took."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        print(f"{self.text}: {time.perf_counter() - self.start:.1f} s", flush=True)
