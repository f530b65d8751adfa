"""Text from models and files in Markdown, where nothing of it is markup."""

import html
import re
from collections.abc import Sequence


def one_line(text: str) -> str:
    """Text without line breaks and control characters, which could paint over a terminal."""
    return "".join(character for character in " ".join(text.split()) if character.isprintable())


def escape(text: str) -> str:
    """Return text for a cell or a line of Markdown, in which nothing of it is markup, HTML or a link.

    Args:
        text: Any text.

    Returns:
        One line; what GitHub or the Hub would make a link, a mention or mathematics of stands as entities.
    """
    line = html.escape(one_line(text), quote=False)
    line = re.sub(r"([\\`*_\[\]|~])", r"\\\1", line)
    line = re.sub(r":(?=//)|[@$]", lambda sign: f"&#{ord(sign[0])};", line)
    return re.sub(r"(?i)\bwww\.", "www&#46;", line)


def markdown_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as a table in Markdown, the first one its header; all text is escaped."""
    lines = ["| " + " | ".join(map(escape, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
