"""Runs commands and code of the README one after the other, in a process of its own: the Hub's client reads its
settings when it is imported. What they print goes to standard error; the results are one line of JSON."""

import json
import shlex
import sys
from contextlib import redirect_stdout

import torch

from lox_hf.cli.main import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    commands, code = json.loads(sys.stdin.read())
    with redirect_stdout(sys.stderr):
        results = [main(shlex.split(command)[1:]) for command in commands]
        names: dict[str, object] = {}
        exec(compile(code, "README.md", "exec"), names)
    print(json.dumps([results, type(names["model"]).__name__]))
