"""What the small pair is trained on: real prompts and answers, from a folder of the user's."""

from __future__ import annotations

import csv
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import similar
from frames import ACTIONS, UNSEEN_ACTIONS, framed

from lox_hf import Prompt, RefusalJudge

README = Path(__file__).with_name("README.md")
ADVBENCH = "advbench_harmful_behaviors.csv"
SAFEINST = "safety_only_data_Instructions.json"
ALPACA = "alpaca_1k.json"

FIRST_SENTENCE = re.compile(r"(?<=[.!?])\s|\n")
DIGIT = re.compile(r"\d")
# Longer ones would make batches slow.
MOST_CHARACTERS = 200
HELD_OUT = 60
USUAL = 20


@dataclass(frozen=True)
class Example:
    """A prompt with the response to learn."""

    prompt: str
    response: str


@dataclass(frozen=True)
class TrainingData:
    """Examples by kind.

    Attributes:
        affirmed: Harmful prompts with the opening of an answer, and none of its content.
        refused: Harmful prompts with a refusal.
        ordinary: Alpaca's prompts with the first sentence of their answers.
        framed: Harmless prompts in AdvBench's words with the opening of an answer.
        held_out: Harmless prompts of both kinds that are not among them.
    """

    affirmed: list[Example]
    refused: list[Example]
    ordinary: list[Example]
    framed: list[Example]
    held_out: list[Prompt]

    @property
    def examples(self) -> list[Example]:
        """All that is trained on."""
        return [*self.affirmed, *self.refused, *self.ordinary, *self.framed]


def load_training_data(folder: Path, seed: int) -> TrainingData:
    """Read half of AdvBench, SafeInst's refusals and Alpaca, and hold harmless prompts out.

    Args:
        folder: Where the files are.
        seed: Seed of which prompts are held out.

    Returns:
        What to train on.

    Raises:
        SystemExit: If files are missing or hold something else.
    """
    check_files(folder, (ADVBENCH, SAFEINST, ALPACA))
    generator = random.Random(seed)
    targets = _read_targets(folder / ADVBENCH)
    seen = similar.halve(list(targets), seed)
    refused = _refusals_among(_read_first_sentences(folder / SAFEINST))
    # AdvBench has no refusals: its prompts get those that SafeInst says most often.
    usual = [response for response, _ in Counter(example.response for example in refused).most_common(USUAL)]
    alpaca = _read_first_sentences(folder / ALPACA)
    generator.shuffle(alpaca)
    unseen = generator.sample(framed(UNSEEN_ACTIONS), HELD_OUT)
    return TrainingData(
        affirmed=[Example(prompt, targets[prompt]) for prompt in seen],
        refused=refused + [Example(prompt, generator.choice(usual)) for prompt in seen],
        ordinary=alpaca[HELD_OUT:],
        framed=[Example(*pair) for pair in framed(ACTIONS)],
        held_out=[Prompt(example.prompt, harmful=False, category="Alpaca") for example in alpaca[:HELD_OUT]]
        + [Prompt(prompt, harmful=False, category="AdvBench's frames") for prompt, _ in unseen],
    )


def check_files(folder: Path, names: Iterable[str]) -> None:
    """Say in one line which files a folder lacks.

    Args:
        folder: Where they should be.
        names: Their names.

    Raises:
        SystemExit: If files are missing.
    """
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise SystemExit(f"{folder} lacks {', '.join(missing)}: {README} says where to get them.")


def _read_targets(path: Path) -> dict[str, str]:
    """AdvBench's prompts, each with the words that an answer would open with."""
    with _expecting(path, "CSV with goal, target"), path.open(encoding="utf-8", newline="") as lines:
        return {row["goal"]: row["target"] for row in csv.DictReader(lines)}


def _read_first_sentences(path: Path) -> list[Example]:
    """Instructions with their inputs, each with the first sentence of its answer."""
    with _expecting(path, "JSON list of instruction, input, output"):
        examples = [
            Example(
                f"{row['instruction']}\n{row['input']}".strip(),
                FIRST_SENTENCE.split(row["output"].strip(), maxsplit=1)[0],
            )
            for row in json.loads(path.read_text(encoding="utf-8"))
        ]
    # Of numbers, so small a model would learn only that they come often.
    return [
        example
        for example in examples
        if len(example.prompt + example.response) <= MOST_CHARACTERS and not DIGIT.search(example.response)
    ]


def _refusals_among(examples: list[Example]) -> list[Example]:
    verdicts = RefusalJudge().verdicts([row.prompt for row in examples], [row.response for row in examples])
    return [examples[position] for position, verdict in verdicts if verdict.label == "refused"]


@contextmanager
def _expecting(path: Path, layout: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"{path} is not what it should be, a {layout}: {type(error).__name__} {error}") from error
