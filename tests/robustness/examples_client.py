"""Loads rows for `test_data_files.py`: a program, since the Hub's client reads its settings when imported.

Each argument is the name of a data set; the prompts or the error of each is printed as JSON.
"""

import json
import sys

from lox_hf.robustness.attacks.examples import load_examples


def outcome(name: str) -> list[str] | str:
    try:
        return [example.prompt for example in load_examples(name)]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    print(json.dumps([outcome(name) for name in sys.argv[1:]]))
