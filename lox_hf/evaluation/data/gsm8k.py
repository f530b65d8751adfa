"""GSM8K: its questions, the reference's prompt for them, and the number in an answer."""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lox_hf.errors import PromptError, listing
from lox_hf.evaluation.data.prompts import check_number
from lox_hf.evaluation.data.sets import PromptSet, download_prompts
from lox_hf.evaluation.data.tables import fold, read_rows
from lox_hf.evaluation.models.templates import ALPACA

DATA_SET = PromptSet("GSM8K", "openai/gsm8k", "main/test*.parquet", False, "mit")
COLUMNS = ("question", "answer")
PROMPT = ALPACA.replace("{turns}", "### Instruction:\n{question}") + " "
"""The reference's, which ends in a space. Its own BOS is left out: the tokenizer puts the one that belongs there."""
MARKER = "####"
# With or without thousands separators, a currency before or behind the minus. A minus with a number or a word right
# before it is none: 20-5 ends in 5.
_NUMBER = re.compile(
    r"(?P<before>(?<![A-Za-z0-9)])[-\u2212])?(?:[$\u20ac\u00a3](?P<behind>[-\u2212])?)?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
)


@dataclass(frozen=True)
class Question:
    """A question with its number.

    Attributes:
        text: The question.
        number: The right answer.
    """

    text: str
    number: float


def load_questions(name_or_path: str | Path = "gsm8k", n: int | None = None) -> list[Question]:
    r"""Load questions with known numbers.

    Args:
        name_or_path: "gsm8k" for the 1319 test questions from the Hub, or a file with the columns question and answer,
            where the number stands after "####" at the end of the answer; `lox_hf.evaluation.data.tables.read_rows`
            says which files.
        n: The first n questions only; None takes all.

    Returns:
        The questions in their order.

    Raises:
        ConfigError: If n is not positive.
        PromptError: If the questions cannot be read, or one has no text or no number.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "questions.jsonl"
        >>> _ = path.write_text('{"question": "What is 2 times 21?", "answer": "2 * 21 = 42\\n#### 42"}')
        >>> load_questions(path)
        [Question(text='What is 2 times 21?', number=42.0)]
    """
    check_number(n)
    on_hub = isinstance(name_or_path, str) and fold(name_or_path) == fold(DATA_SET.name)
    paths = download_prompts(DATA_SET) if on_hub else [Path(name_or_path)]
    rows = [row for path in paths for row in read_rows(path, COLUMNS)][:n]
    if not rows:
        raise PromptError(f"'{name_or_path}' holds no questions.")
    questions, wrong = [], []
    for place, row in enumerate(rows, 1):
        text, number = row.get("question"), number_after_marker(str(row.get("answer")))
        if isinstance(text, str) and text.strip() and number is not None:
            questions.append(Question(text, number))
        else:
            wrong.append(f"row {place}")
    if wrong:
        raise PromptError(
            f"'{name_or_path}': expected the columns question and answer, the number behind '{MARKER}' in the answer; "
            f"{len(wrong)} of {len(rows)} rows have not: {listing(wrong, 5)}"
        )
    return questions


def questions_hash(questions: Iterable[Question]) -> str:
    """Return the SHA-256 of questions and numbers, in their order."""
    lines = "\n".join(json.dumps([question.text, question.number]) for question in questions)
    return hashlib.sha256(lines.encode()).hexdigest()


def number_after_marker(text: str) -> float | None:
    r"""Read the number behind the last "####".

    What follows the marker is read as the reference reads it: commas are taken out, and the rest is a number as a
    whole. Where it is not, the first number in it counts, which the reference gives up on: "$18", "18 eggs" and
    "18" with more text behind. Without a marker the text must be a number and nothing else.

    Args:
        text: An answer.

    Returns:
        The number; None where there is none.

    Example:
        >>> number_after_marker("She makes 9 * 2 dollars.\n#### 18"), number_after_marker("#### -$1,050.50 a day.")
        (18.0, -1050.5)

    Source: the reference's fine-tuning-attacks/acc_gsm.py.
    """
    tail = text.split(MARKER)[-1]
    try:
        number = float(tail.replace(",", ""))
    except ValueError:
        numbers = _numbers(tail) if MARKER in text else []
        number = numbers[0] if numbers else math.nan
    return number if math.isfinite(number) else None


def last_number(text: str) -> float | None:
    """Read the last number in a text, as for answers to a chat.

    The reference does so too, but cuts numbers into pieces: it reads 1234 as 4 (but 1,234 whole), and 3.5 as 5.

    Args:
        text: An answer.

    Returns:
        The number; None where there is none.

    Example:
        >>> last_number("9 eggs at $2 make **$18.00** a day."), last_number("None.")
        (18.0, None)

    Source: the reference's fine-tuning-attacks/acc_gsm.py, with --chat.
    """
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def _numbers(text: str) -> list[float]:
    return [
        float(("-" if found["before"] or found["behind"] else "") + found["digits"].replace(",", ""))
        for found in _NUMBER.finditer(text)
    ]
