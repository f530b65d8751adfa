"""Pieces of work of the Space one after the other in one process, for `test_space.py`: one each would take minutes.

It reads a list of tasks from standard input and prints a list of answers.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import space_world  # noqa: F401  # finds the Space

from lox_space import worker  # isort: skip


def answer(task: dict) -> dict:
    """Do it in an empty folder, as the Space does, and say what lies there afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        found = worker.answer(task)
        used = sum(path.stat().st_blocks * 512 for path in Path(folder).rglob("*") if path.is_file())
        os.chdir("/")
    return {**found, "used_bytes": used, "folder": folder}


if __name__ == "__main__":
    print(json.dumps([answer(task) for task in json.load(sys.stdin)]))
