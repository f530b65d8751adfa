"""Which column of a table holds the prompt, its category, its label, and what a cell of them says."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lox_hf.errors import PromptError, listing
from lox_hf.evaluation.data.tables import MESSAGES, TEXT, Row, fold, is_blank

# The weaker names count where a table has none of the others: JailbreakBench's "Behavior" is the topic of its "Goal".
PROMPT_COLUMNS = ("prompt", "forbidden_prompt", "goal", "instruction", "question", "query", "request")
WEAKER_PROMPT_COLUMNS = ("behavior", "behaviour", TEXT, "input", MESSAGES, "conversations", "conversation")
# Of these the first that is there counts.
CATEGORY_COLUMNS = ("category", "semantic_category", "harm_category", "type", "functional_category", "topic")
LABEL_COLUMNS = ("label", "harmful", "is_harmful", "prompt_label", "prompt_harm_label")
CONTEXT_COLUMNS = ("context_string", "context")
REFERENCE_COLUMNS = ("reference",)
INPUT_COLUMNS = ("input",)

USER_ROLES = {"user", "human"}
HARMFUL = {"unsafe", "harmful", "true", "1", "1.0"}
HARMLESS = {"safe", "harmless", "unharmful", "benign", "false", "0", "0.0"}
CONTEXT_SEPARATOR = "\n\n---\n\n"  # HarmBench's own, between a context and its behaviour
INPUT_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class PromptColumns:
    """The columns of a table, as the table spells them; None where it has none.

    Attributes:
        prompt: What is asked.
        category: The prompt's category.
        label: Whether it is harmful.
        context: What stands in front of the prompt.
        behind: What stands behind it: the input of Alpaca's instructions.
        reference: An answer that counts as strict success.
    """

    prompt: str
    category: str | None
    label: str | None
    context: str | None
    behind: str | None
    reference: str | None


def find_columns(rows: Iterable[Row], column: str | None = None) -> PromptColumns:
    """Find the columns by their names; case and punctuation do not matter.

    Args:
        rows: The table.
        column: Name of the prompt's column; None finds it.

    Returns:
        The columns.

    Raises:
        PromptError: If no column or more than one can be the prompt's.

    Example:
        >>> find_columns([{"Goal": "Pick a lock", "Category": "Property"}]).category
        'Category'
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    prompt = _prompt_column(names, column)
    others = [name for name in names if name != prompt]
    return PromptColumns(
        prompt=prompt,
        category=_first(others, CATEGORY_COLUMNS),
        label=_first(others, LABEL_COLUMNS),
        context=_first(others, CONTEXT_COLUMNS),
        behind=_first(others, INPUT_COLUMNS) if fold(prompt) == "instruction" else None,
        reference=_first(others, REFERENCE_COLUMNS),
    )


def prompt_fields(row: Row, columns: PromptColumns) -> dict[str, Any]:
    r"""Return what a row says, as the fields of `lox_hf.evaluation.data.prompts.Prompt`.

    Args:
        row: A row of the table.
        columns: The table's columns.

    Returns:
        Values by field.

    Raises:
        ValueError: If the prompt is blank or no text, or the label says neither harmful nor harmless.

    Example:
        >>> row = {"instruction": "Translate into French.", "input": "Good morning."}
        >>> prompt_fields(row, find_columns([row]))["text"]
        'Translate into French.\n\nGood morning.'
    """
    category = row.get(columns.category) if columns.category else None
    return {
        "text": _prompt_text(row, columns),
        "harmful": _is_harmful(row.get(columns.label)) if columns.label else True,
        "category": "" if is_blank(category) else str(category),
        "reference": _text(row, columns.reference),
    }


def _prompt_column(names: Sequence[str], column: str | None) -> str:
    if column is None:
        found = _all(names, PROMPT_COLUMNS) or _all(names, WEAKER_PROMPT_COLUMNS)
        problem = "No column has a name that prompts are known by"
    else:
        found = [name for name in names if name == column] or _all(names, [column])
        problem = f"There is no column {column!r}"
    if len(found) == 1:
        return found[0]
    if found:
        problem = f"The columns {' and '.join(map(repr, found))} could each be the prompts"

    shown = listing((f"{name!r:.40}" for name in names), 12)
    raise PromptError(
        f"{problem}. Pass the right one as `column`, or give the file a header that names it. Its columns: {shown}"
    )


def _all(names: Iterable[str], wanted: Iterable[str]) -> list[str]:
    folded = set(map(fold, wanted))
    return [name for name in names if fold(name) in folded]


def _first(names: Iterable[str], wanted: Iterable[str]) -> str | None:
    return next((found[0] for one in wanted if (found := _all(names, [one]))), None)


def _prompt_text(row: Row, columns: PromptColumns) -> str:
    context, prompt, behind = (_text(row, name) for name in (columns.context, columns.prompt, columns.behind))
    if is_blank(prompt):
        raise ValueError(f"{columns.prompt!r} is blank")
    text = prompt if is_blank(context) else f"{context}{CONTEXT_SEPARATOR}{prompt}"
    text = text if is_blank(behind) else f"{text}{INPUT_SEPARATOR}{behind}"
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{columns.prompt!r} holds half of a surrogate pair, which UTF-8 cannot write")
    return text


def _text(row: Row, name: str | None) -> str:
    """Text of a cell; of chat messages the user's last turn."""
    value = row.get(name) if name else None
    if isinstance(value, list):
        value = _last_user_turn(value)
    if isinstance(value, str | None):
        return value or ""
    raise ValueError(f"{name!r} is {type(value).__name__}, expected a text")


def _last_user_turn(turns: list[Any]) -> Any:
    for turn in reversed(turns):
        if isinstance(turn, dict) and turn.get("role", turn.get("from")) in USER_ROLES:
            return turn.get("content", turn.get("value"))
    return None


def _is_harmful(label: Any) -> bool:
    said = str(label).strip().casefold()
    if said not in HARMFUL | HARMLESS:
        raise ValueError(
            f"the label is {label!r:.40}, expected harmful or harmless, unsafe or safe, 1 or 0; rename a column that "
            "says something else"
        )
    return said in HARMFUL
