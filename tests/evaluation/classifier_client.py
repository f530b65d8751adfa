"""Classifiers by id for `test_classifier_judge.py`: a program, since the Hub client reads its settings when imported.

Two prompts, two responses, then ids; settings and labels, or the error, of each id are printed as JSON.
"""

import json
import sys
from typing import Any

from lox_hf.evaluation.judges import get_judge


def outcome(name: str, prompts: list[str], responses: list[str]) -> tuple[dict[str, Any], list[str]] | str:
    try:
        judge = get_judge(f"classifier:{name}")
        found = dict(judge.verdicts(prompts, responses))
        return judge.settings(), [found[position].label for position in range(len(prompts))]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    print(json.dumps([outcome(name, sys.argv[1:3], sys.argv[3:5]) for name in sys.argv[5:]]))
