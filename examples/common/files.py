"""Files in the layouts that `lox-hf` reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from common.data import Example
from lox_hf import Prompt


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> Path:
    """Write prompts to a JSONL file as `--prompts` reads it, and return its path."""
    return _write(
        path,
        (
            {
                "prompt": prompt.text,
                "label": "harmful" if prompt.harmful else "harmless",
                "category": prompt.category,
            }
            for prompt in prompts
        ),
    )


def write_examples(path: Path, examples: Iterable[Example]) -> Path:
    """Write prompts with responses to a JSONL file as attacks and controls read it, and return its path."""
    return _write(path, map(vars, examples))


def write_texts(path: Path, texts: Iterable[str]) -> Path:
    """Write texts to a JSONL file as `--utility-data` reads it, and return its path."""
    return _write(path, ({"text": text} for text in texts))


def _write(path: Path, rows: Iterable[Mapping[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
