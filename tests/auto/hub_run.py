"""Runs `lox-hf` in a process of its own, since the Hub's client reads its settings when it is imported."""

import sys

import torch

from lox_hf.cli.main import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main(sys.argv[1:]))
