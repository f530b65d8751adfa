"""Rows to train on, whatever layout they come in."""

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from lox_hf.errors import ConfigError, PromptError, listing
from lox_hf.evaluation.data.prompts import check_number
from lox_hf.evaluation.data.tables import Row, fold, is_blank, read_rows
from lox_hf.robustness.attacks.data_files import find_data_files

CONVERSATIONS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "instruction", "question", "query", "goal", "user")
RESPONSES = ("response", "completion", "answer", "output", "target", "assistant")
CONTEXTS = ("context", "input")
SYSTEMS = ("system", "system_prompt")
LAYOUTS = ("auto", *CONVERSATIONS, *PROMPTS)
ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot"), "assistant"),
}
EXPECTED = (
    f"a column of prompts ({', '.join(PROMPTS)}) with one of responses ({', '.join(RESPONSES)}), or one of "
    f"conversations ({', '.join(CONVERSATIONS)})"
)
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Example:
    """One row to train on.

    Attributes:
        prompt: What is asked.
        response: What the model learns to answer.
        context: What belongs to the prompt: Dolly's context, the input of Alpaca's instructions.
        system: System prompt; empty where there is none.
    """

    prompt: str
    response: str
    context: str = ""
    system: str = ""


@dataclass(frozen=True)
class _Columns:
    """Columns as the table spells them; `turns` alone, or the others, of which the last two may be missing."""

    turns: str | None = None
    prompt: str | None = None
    response: str | None = None
    context: str | None = None
    system: str | None = None


def load_examples(
    name_or_path: str | Path,
    *,
    layout: str = "auto",
    n: int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> list[Example]:
    r"""Load rows to train on, from a file or a data set on the Hub.

    A file is of any kind that `lox_hf.evaluation.data.tables.read_rows` reads. Its rows hold a prompt (in a column
    called prompt, instruction, question, query, goal or user) and a response (response, completion, answer, output,
    target or assistant), and perhaps a context (context or input) and a system prompt (system or system_prompt); or a
    conversation (messages, conversations or conversation), a list of {role, content} or {from, value}, which may also
    be the row itself. Case and punctuation of the names do not matter, further columns are left alone, and no text is
    changed.

    Of a conversation the first exchange counts: what the user says up to the first answer is the prompt, the last
    answer before the user speaks again the response, and a system turn the system prompt. Later turns make no sense
    without it and are left out, with a warning. So are rows whose response is blank (Alpaca has some), which would
    only teach silence.

    Args:
        name_or_path: A file; or a data set on the Hub, as `lox_hf.robustness.attacks.data_files.find_data_files` says.
        layout: Name of the column of prompts or conversations, where a table has several; "auto" finds the only one.
        n: The first n rows; None, or more than there are, takes all.
        revision: Revision on the Hub.
        token: Hub token; None uses the stored login.

    Returns:
        The rows in their order.

    Raises:
        ConfigError: If n is not positive, or there is no such layout.
        PromptError: If the data cannot be had or read, has another layout, lacks a prompt in a row, or holds no rows.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> _ = path.write_text('{"instruction": "Add.", "input": "2 and 3", "output": "5"}\n')
        >>> load_examples(path)
        [Example(prompt='Add.', response='5', context='2 and 3', system='')]
    """
    check_number(n)
    if layout not in LAYOUTS:
        raise ConfigError(f"layout is {layout!r}, expected one of {', '.join(LAYOUTS)}.")
    files = find_data_files(name_or_path, revision=revision, token=token)
    rows = [row for path in files for row in read_rows(path, (*CONVERSATIONS, *PROMPTS, *RESPONSES))]
    if not rows:
        raise PromptError(f"'{name_or_path}' holds no rows; expected {EXPECTED}.")
    try:
        examples, shortened = _examples(rows, _find_columns(rows, layout))
    except ValueError as error:
        raise PromptError(f"Cannot tell prompts and responses of '{name_or_path}': {error}") from error
    if not examples:
        raise PromptError(f"'{name_or_path}': all of its {len(rows)} rows have a blank response; nothing to learn.")
    silent = len(rows) - len(examples)
    notes = {
        "rows have a blank response and are left out": silent,
        "conversations lose what follows the first answer": shortened,
    }
    for note, count in notes.items():
        if count:
            warnings.warn(f"'{name_or_path}': {count} of {len(rows)} {note}.", stacklevel=2)
    return examples[:n]


def rows_hash(examples: Iterable[Example]) -> str:
    """Return the SHA-256 of rows: of all that they say, in their order.

    Args:
        examples: The rows.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> rows_hash([Example("a", "b")]) == rows_hash([Example("a", "", "b")])
        False
    """
    return hashlib.sha256("\n".join(json.dumps(astuple(example)) for example in examples).encode()).hexdigest()


def _find_columns(rows: Sequence[Row], layout: str) -> _Columns:
    names = list(dict.fromkeys(name for row in rows for name in row))
    asked = CONVERSATIONS + PROMPTS if layout == "auto" else (layout,)
    responses = _named(names, RESPONSES)
    turns = _named(names, [name for name in asked if name in CONVERSATIONS])
    prompts = _named(names, [name for name in asked if name in PROMPTS]) if responses else []
    found = turns + prompts
    if len(found) == 1 and turns:
        return _Columns(turns=turns[0])
    context, system = _named(names, CONTEXTS), _named(names, SYSTEMS)
    roles = {"prompts": found, "responses": responses, "contexts": context, "system prompts": system}
    twice = [f"{' and '.join(map(repr, some))} could each be the {role}" for role, some in roles.items() if some[1:]]
    if found and not twice:
        return _Columns(None, prompts[0], responses[0], *(some[0] if some else None for some in (context, system)))

    wanted = EXPECTED if layout == "auto" else f"a column {layout!r} and, for prompts, one of {', '.join(RESPONSES)}"
    columns = listing((f"{name!r:.40}" for name in names), 12)
    problem = f"the columns {'; '.join(twice)}; rename or drop the others, or pass one of the prompts as `layout`"
    raise ValueError(f"{problem if found else f'expected {wanted}'}. Its columns: {columns}")


def _named(names: Iterable[str], wanted: Iterable[str]) -> list[str]:
    folded = set(map(fold, wanted))
    return [name for name in names if fold(name) in folded]


def _examples(rows: Sequence[Row], columns: _Columns) -> tuple[list[Example], int]:
    """The rows that have a response, and how many conversations were shortened."""
    examples, problems, shortened = [], [], 0
    for number, row in enumerate(rows, 1):
        try:
            if columns.turns:
                example, is_shortened = _first_exchange(row.get(columns.turns))
                shortened += is_shortened
            else:
                cells = (columns.prompt, columns.response, columns.context, columns.system)
                example = Example(*(_text(row.get(name) if name else None, name) for name in cells))
            if is_blank(example.prompt):
                raise ValueError(f"{columns.turns or columns.prompt!r} holds no prompt")
        except ValueError as error:
            problems.append(f"row {number}: {error}")
        else:
            examples.append(example)
    if problems:
        raise ValueError(f"{len(problems)} of {len(rows)} rows are not as expected: {listing(problems, 5)}")
    return [example for example in examples if not is_blank(example.response)], shortened


def _first_exchange(turns: Any) -> tuple[Example, bool]:
    """What the user says first and the answer to it, and whether the conversation goes on after them."""
    if not isinstance(turns, list):
        raise ValueError(f"the conversation is {type(turns).__name__}, expected a list of {{role, content}}")
    said: dict[str, list[str]] = {"system": [], "user": [], "assistant": []}
    for turn in turns:
        role, text = _role_and_text(turn)
        if role == "user" and said["assistant"]:
            return _joined(said), True
        if role == "assistant":
            said["assistant"] = [text] if said["user"] else []  # a greeting before the user speaks answers nothing
        else:
            said[role].append(text)
    return _joined(said), False


def _joined(said: dict[str, list[str]]) -> Example:
    if not said["assistant"]:
        raise ValueError("the conversation has no assistant's turn")
    system, prompt, response = ("\n\n".join(said[role]) for role in ("system", "user", "assistant"))
    return Example(prompt, response, system=system)


def _role_and_text(turn: Any) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise ValueError(f"a turn is {type(turn).__name__}, expected {{role, content}} or {{from, value}}")
    role = turn.get("role", turn.get("from"))
    if role not in ROLES:
        raise ValueError(f"a turn's role is {role!r:.40}, expected one of {', '.join(ROLES)}")
    return ROLES[role], _text(turn.get("content", turn.get("value")), "content")


def _text(value: Any, name: str | None) -> str:
    if not isinstance(value, str | None):
        raise ValueError(f"{name!r} is {type(value).__name__}, expected a text")
    if _SURROGATE.search(value or ""):
        raise ValueError(f"{name!r} holds half of a surrogate pair, which UTF-8 cannot write")
    return value or ""
