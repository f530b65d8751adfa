"""Preference pairs of HH-RLHF: from a local file or from the Hub, as prompt and two completions."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path

TURN = "\n\nAssistant:"
HUB_ID, HUB_FOLDER = "Anthropic/hh-rlhf", "harmless-base"


@dataclass(frozen=True)
class Preference:
    """One dialogue with a preferred and a rejected last answer."""

    prompt: str
    chosen: str
    rejected: str


def load_preferences(path: Path | None) -> list[Preference]:
    """Read the pairs of a .jsonl or .jsonl.gz file, or of the Hub's test split where no file is named.

    Args:
        path: File with `chosen` and `rejected` dialogues; None downloads.

    Returns:
        The pairs, in the order of the file.

    Raises:
        SystemExit: If the file does not exist, or the Hub cannot be reached.
    """
    if path is None:
        rows = _download()
    elif path.is_file():
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
    else:
        raise SystemExit(
            f"There is no file '{path}'. Pass --data with a .jsonl or .jsonl.gz file of chosen, rejected."
        )
    pairs = [split_dialogue(row["chosen"], row["rejected"]) for row in rows]
    return [pair for pair in pairs if pair is not None]


def split_dialogue(chosen: str, rejected: str) -> Preference | None:
    r"""Split two dialogues after the last turn marker of the assistant that they share.

    Args:
        chosen: The dialogue with the preferred answer: "\\n\\nHuman: ...\\n\\nAssistant: ...".
        rejected: The dialogue with the other one.

    Returns:
        The pair; None where they share no such turn, or where an answer is empty or both are the same.
    """
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    end = chosen.rfind(TURN, 0, shared)
    if shared is None or end < 0:
        return None
    end += len(TURN)
    pair = Preference(chosen[:end], chosen[end:], rejected[end:])
    return pair if pair.chosen.strip() and pair.rejected.strip() else None


def hold_out(pairs: list[Preference], held_out: int, seed: int) -> tuple[list[Preference], list[Preference]]:
    """Shuffle, and keep some pairs apart whose prompts occur nowhere among the others.

    Args:
        pairs: All pairs.
        held_out: How many to keep apart, at most a third of all.
        seed: Seed of the shuffle.

    Returns:
        The pairs to train on, and those held out.
    """
    shuffled = random.Random(seed).sample(pairs, len(pairs))
    count = min(held_out, len(pairs) // 3)
    apart, rest = shuffled[:count], shuffled[count:]
    prompts = {pair.prompt for pair in apart}
    return [pair for pair in rest if pair.prompt not in prompts], apart


def _download() -> list[dict[str, str]]:
    from datasets import load_dataset

    try:
        return list(load_dataset(HUB_ID, data_dir=HUB_FOLDER, split="test"))
    except Exception as error:  # whatever the network and the Hub's client raise, the way out is the same
        raise SystemExit(
            f"{HUB_ID} ({HUB_FOLDER}) could not be loaded from the Hub: {type(error).__name__}: {error}\n"
            "Pass --data with a local .jsonl or .jsonl.gz file of chosen, rejected."
        ) from error
