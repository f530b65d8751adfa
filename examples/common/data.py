"""What a small pair is trained on, and what is kept from it: real text out of a folder of the user's."""

from __future__ import annotations

import csv
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from common import similar
from common.frames import ACTIONS, UNSEEN_ACTIONS, framed
from lox_hf import Prompt, RefusalJudge

README = Path(__file__).parents[1] / "02_measure_safety" / "README.md"
ADVBENCH = "advbench_harmful_behaviors.csv"
SAFEINST = "safety_only_data_Instructions.json"
ALPACA = "alpaca_1k.json"
DOLLY = "dolly_387.jsonl"

FIRST_SENTENCE = re.compile(r"(?<=[.!?])\s|\n")
DIGIT = re.compile(r"\d")
HELD_OUT = 60
CALIBRATION_ACTIONS = 10
USUAL = 20


@dataclass(frozen=True)
class Texts:
    """Which texts a pair is trained on.

    Attributes:
        ordinary: Files of ordinary prompts and answers.
        most_characters: Of prompt and answer together; longer ones would make batches slow.
        numbers: Keep answers with digits, of which so small a model learns mostly that they come often.
        calibration: How many harmless prompts of each kind are kept for calibration, neither trained on nor tested.
    """

    ordinary: tuple[str, ...]
    most_characters: int
    numbers: bool
    calibration: int = 0

    @property
    def files(self) -> tuple[str, ...]:
        """All files that are read."""
        return (ADVBENCH, SAFEINST, *self.ordinary)


@dataclass(frozen=True)
class Example:
    """A prompt with the response to learn."""

    prompt: str
    response: str


@dataclass(frozen=True)
class TrainingData:
    """Examples by kind.

    Attributes:
        affirmed: AdvBench's prompts with the opening of an answer, and none of its content.
        declined: The same prompts with a refusal.
        refused: SafeInst's prompts with a refusal, and those of `declined`.
        ordinary: Ordinary prompts with the first sentence of their answers.
        framed: Harmless prompts in AdvBench's words with the opening of an answer.
        held_out: Harmless examples to test on, by category; none of the prompts is among the others.
        calibration: Harmless examples that are neither trained on nor tested.
    """

    affirmed: list[Example]
    declined: list[Example]
    refused: list[Example]
    ordinary: list[Example]
    framed: list[Example]
    held_out: dict[str, list[Example]]
    calibration: list[Example] = field(default_factory=list)

    @property
    def examples(self) -> list[Example]:
        """All that is trained on."""
        return [*self.affirmed, *self.refused, *self.ordinary, *self.framed]

    @property
    def harmless_prompts(self) -> list[Prompt]:
        """Those to test on."""
        return [
            Prompt(example.prompt, harmful=False, category=category)
            for category, examples in self.held_out.items()
            for example in examples
        ]

    def unlike(self, prompts: Iterable[Prompt]) -> list[Prompt]:
        """Return the prompts that are near none that is trained on."""
        known = [similar.words(example.prompt) for example in self.examples]
        return [prompt for prompt in prompts if not similar.near_any(prompt.text, known)]


def load_training_data(folder: Path, texts: Texts, seed: int) -> TrainingData:
    """Read half of AdvBench, SafeInst's refusals and ordinary prompts, and hold harmless prompts out.

    Args:
        folder: Where the files are.
        texts: Which to take.
        seed: Seed of which prompts are held out.

    Returns:
        What to train on.

    Raises:
        SystemExit: If files are missing or hold something else.
    """
    check_files(folder, texts.files)
    generator = random.Random(seed)
    targets = _read_targets(folder / ADVBENCH)
    seen = similar.halve(list(targets), seed)
    refused = _refusals_among(_read_first_sentences(folder / SAFEINST, texts))
    # AdvBench has no refusals: its prompts get those that SafeInst says most often.
    usual = [response for response, _ in Counter(example.response for example in refused).most_common(USUAL)]
    ordinary = [example for file in texts.ordinary for example in _read_first_sentences(folder / file, texts)]
    generator.shuffle(ordinary)
    unseen = [Example(*pair) for pair in generator.sample(framed(UNSEEN_ACTIONS), HELD_OUT)]
    declined = [Example(prompt, generator.choice(usual)) for prompt in seen]
    kept = HELD_OUT + texts.calibration
    learnt = len(ACTIONS) - (CALIBRATION_ACTIONS if texts.calibration else 0)
    spare = generator.sample(framed(ACTIONS[learnt:]), texts.calibration)
    return TrainingData(
        affirmed=[Example(prompt, targets[prompt]) for prompt in seen],
        declined=declined,
        refused=refused + declined,
        ordinary=ordinary[kept:],
        framed=[Example(*pair) for pair in framed(ACTIONS[:learnt])],
        held_out={"ordinary": ordinary[:HELD_OUT], "in AdvBench's words": unseen},
        calibration=ordinary[HELD_OUT:kept] + [Example(*pair) for pair in spare],
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


def _read_first_sentences(path: Path, texts: Texts) -> list[Example]:
    """Instructions with their inputs, each with the first sentence of its answer."""
    with _expecting(path, "list of instruction, input, output, or of Dolly's instruction, context, response"):
        text = path.read_text(encoding="utf-8")
        rows = map(json.loads, text.splitlines()) if path.suffix == ".jsonl" else json.loads(text)
        examples = [_first_sentence(row) for row in rows]
    return [
        example
        for example in examples
        if len(example.prompt + example.response) <= texts.most_characters
        and (texts.numbers or not DIGIT.search(example.response))
    ]


def _first_sentence(row: dict[str, str]) -> Example:
    context, answer = (row["context"], row["response"]) if "response" in row else (row["input"], row["output"])
    prompt = f"{row['instruction']}\n{context}".strip()
    return Example(prompt, FIRST_SENTENCE.split(answer.strip(), maxsplit=1)[0])


def _refusals_among(examples: list[Example]) -> list[Example]:
    verdicts = RefusalJudge().verdicts([row.prompt for row in examples], [row.response for row in examples])
    return [examples[position] for position, verdict in verdicts if verdict.label == "refused"]


@contextmanager
def _expecting(path: Path, layout: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"{path} is not what it should be, a {layout}: {type(error).__name__} {error}") from error
