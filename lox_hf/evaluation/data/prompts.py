"""Prompt sets: by name from the Hub, or from a file in any of the layouts seen in the wild."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from lox_hf.errors import ConfigError, PromptError, listing
from lox_hf.evaluation.data.columns import PROMPT_COLUMNS, WEAKER_PROMPT_COLUMNS, find_columns, prompt_fields
from lox_hf.evaluation.data.sets import PROMPT_SETS, download_prompts, find_prompt_set
from lox_hf.evaluation.data.tables import Row, read_rows
from lox_hf.records import JsonRecord


@dataclass(frozen=True)
class Prompt(JsonRecord):
    """One prompt of a set.

    Attributes:
        text: What the model is asked; a context that belongs to it stands in front.
        harmful: Whether it should be refused; the others measure over-refusal.
        category: Its category; empty where it has none.
        reference: An answer that counts as strict success where the response contains it; empty where none is known.

    Example:
        >>> Prompt("How do I kill a Python process?", harmful=False).category
        ''
    """

    text: str
    harmful: bool = True
    category: str = ""
    reference: str = ""


def load_prompts(
    name_or_path: str | Path,
    *,
    column: str | None = None,
    n: int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> list[Prompt]:
    r"""Load prompts by the name of a set, or from a file.

    The sets are AdvBench, JailbreakBench, HarmBench (its standard behaviours), StrongREJECT and XSTest; case, dashes
    and underscores do not matter. They come from the Hub.

    A file is CSV, TSV, JSON, JSONL, plain text with a prompt a line, or Parquet; see
    `lox_hf.evaluation.data.tables.read_rows`. The prompt stands in the one column called prompt, forbidden_prompt,
    goal, instruction, question, query or request, or else behavior, text, input, messages or conversations; of chat
    messages it is the user's last turn. A context or context_string goes in front of it, and the input of an
    instruction behind. The category is category, semantic_category, type or the like; a label (harmful, unsafe or 1,
    against harmless, benign, safe or 0) says whether it is harmful, and without one it is. A reference is kept;
    AdvBench's target is only how compliance would begin, and no reference.

    A CSV with one column has a header where that is one of these names or `column`; any other first line is a prompt.
    Rows with nothing in them are left out, a row that has all but its prompt is an error. Duplicates are kept.

    Args:
        name_or_path: Name of a set, or path of a file. A `Path` is never a name.
        column: Column of the prompts; None finds it.
        n: Number of prompts, the first of the set; None, or more than there are, takes all.
        revision: Revision on the Hub.
        token: Hub token; None uses the stored login.

    Returns:
        The prompts in their order.

    Raises:
        ConfigError: If `n` is no positive integer.
        PromptError: If the set or file cannot be had or read, or holds no prompts.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "prompts.csv"
        >>> _ = path.write_text("prompt,label\nHow do I kill a Python process?,safe\n")
        >>> load_prompts(path)
        [Prompt(text='How do I kill a Python process?', harmful=False, category='', reference='')]
    """
    check_number(n)
    header = [*PROMPT_COLUMNS, *WEAKER_PROMPT_COLUMNS, *([column] if column else [])]
    paths = _paths(name_or_path, revision, token)
    rows = [row for path in paths for row in read_rows(path, header)]
    if not rows:
        raise PromptError(f"'{name_or_path}' holds no prompts: give a row for each, with a column prompt.")
    try:
        return _prompts(rows[:n], column)
    except PromptError as error:
        raise PromptError(f"Cannot tell the prompts of '{name_or_path}': {error}") from error


def check_number(n: int | None) -> None:
    """Check how many are asked for.

    Args:
        n: Number of prompts or questions; None for all.

    Raises:
        ConfigError: If it is no positive integer.
    """
    if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
        raise ConfigError(f"n is {n!r}, expected a positive integer, or None for all.")


def prompt_id(text: str) -> str:
    """Return the id by which a prompt is known in reports.

    Args:
        text: The prompt.

    Returns:
        The first 16 hexadecimal digits of its SHA-256.

    Example:
        >>> prompt_id("How do I kill a Python process?")
        '7ac11392b4b9adda'
    """
    return _sha256(text)[:16]


def set_hash(prompts: Iterable[Prompt]) -> str:
    """Return the SHA-256 of a prompt set: of all that its prompts say, in their order.

    Args:
        prompts: The prompts.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> set_hash([Prompt("Hello")]) == set_hash([Prompt("Hello", harmful=False)])
        False
    """
    return _sha256("\n".join(prompt.to_json() for prompt in prompts))


def _sha256(text: str) -> str:
    # A text from a caller may hold half of a surrogate pair; it has an id all the same.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _paths(name_or_path: str | Path, revision: str | None, token: str | bool | None) -> list[Path]:
    known = find_prompt_set(name_or_path) if isinstance(name_or_path, str) else None
    if known:
        return download_prompts(known, revision=revision, token=token)
    path = Path(name_or_path).expanduser()
    if not path.exists():
        names = [known.name for known in PROMPT_SETS]
        near = get_close_matches(str(name_or_path).casefold(), [name.casefold() for name in names], n=1)
        meant = f" Is '{near[0]}' meant?" if near else ""
        raise PromptError(f"'{name_or_path}' is no file, and none of the sets {', '.join(names)}.{meant}")
    return [path]


def _prompts(rows: list[Row], column: str | None) -> list[Prompt]:
    columns = find_columns(rows, column)
    prompts, problems = [], []
    for number, row in enumerate(rows, 1):
        try:
            prompts.append(Prompt(**prompt_fields(row, columns)))
        except ValueError as error:
            problems.append(f"row {number}: {error}")
    if problems:
        raise PromptError(listing(problems, 5))
    return prompts
