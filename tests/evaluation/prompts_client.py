"""Loads prompts for `test_prompts_hub.py`: a program, since the Hub's client reads its settings when imported.

Each argument is the keyword arguments of one call, in JSON; the prompts or the error of each is printed as JSON.
"""

import json
import sys
from typing import Any

from lox_hf.evaluation.data.prompts import load_prompts


def outcome(name_or_path: str, **settings: Any) -> list[dict[str, Any]] | str:
    try:
        return [prompt.to_dict() for prompt in load_prompts(name_or_path, **settings)]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    print(json.dumps([outcome(**json.loads(call)) for call in sys.argv[1:]]))
