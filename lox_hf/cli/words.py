"""Lists, numbers, seeds and settings as the command line takes them, and times as it shows them."""

import json
from typing import Any

from lox_hf.errors import ConfigError


def parse_words(value: Any) -> list[str]:
    r"""Return words one by one, also where commas join them; a comma in brackets is part of a regular expression.

    Args:
        value: A word or several, or what YAML made of them.

    Returns:
        The words.

    Example:
        >>> parse_words(["all,mlp", r"layers\.\d{1,2}\..*"])
        ['all', 'mlp', 'layers\\.\\d{1,2}\\..*']
    """
    items = value if isinstance(value, list) else [value]
    return [word for item in items for word in _split(str(item)) if word]


def parse_number(flag: str, word: str, kind: type) -> Any:
    """Read a number.

    Args:
        flag: The option, for the message.
        word: The word.
        kind: int or float.

    Returns:
        The number.

    Raises:
        ConfigError: If it is none.
    """
    try:
        return kind(word)
    except ValueError:
        raise ConfigError(f"{flag} takes numbers, got '{word}'.") from None


def parse_seeds(words: list[str]) -> list[int]:
    """Read seeds: one number is how many, several are the seeds themselves; "12," is the one seed 12.

    Args:
        words: Words of the command line.

    Returns:
        The seeds.

    Raises:
        ConfigError: If one is no whole number from 0, or there are none.
    """
    seeds = [parse_number("--seeds", word, int) for word in parse_words(words)]
    if len(seeds) == 1 and "," not in "".join(map(str, words)):
        seeds = list(range(seeds[0]))
    if not seeds or min(seeds) < 0:
        raise ConfigError(f"--seeds takes how many, or the seeds themselves such as 12,13,14; got {' '.join(words)}.")
    return seeds


def parse_settings(flag: str, words: list[str]) -> dict[str, Any]:
    """Read NAME=VALUE pairs, or an object of JSON as a YAML file's comes; a value is read as JSON where it is some.

    Args:
        flag: The option, for the message.
        words: Words of the command line.

    Returns:
        Values by name.

    Raises:
        ConfigError: If a word is neither.
    """
    found: dict[str, Any] = {}
    for word in words:
        if isinstance(whole := _json(word), dict):
            found |= whole
            continue
        name, sign, value = word.partition("=")
        if not sign or not name:
            raise ConfigError(f"{flag} takes NAME=VALUE, got '{word}'.")
        found[name.replace("-", "_")] = _json(value)
    return found


def duration(seconds: float) -> str:
    """Write a time in the unit that it is read in.

    Args:
        seconds: The time.

    Returns:
        Such as "12 s", "5 min" or "3.5 h".
    """
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _split(text: str) -> list[str]:
    """Cut at the commas outside brackets."""
    words, depth = [""], 0
    for character in text:
        if character == "," and depth == 0:
            words.append("")
            continue
        depth = max(0, depth + (character in "([{") - (character in ")]}"))
        words[-1] += character
    return words


def _json(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word
