"""Lists, numbers and seeds as the command line takes them."""

from typing import Any

from lox_hf.errors import ConfigError


def parse_words(value: Any) -> list[str]:
    """Return words one by one, also where commas join them.

    Args:
        value: A word or several, or what YAML made of them.

    Returns:
        The words.
    """
    items = value if isinstance(value, list) else [value]
    return [word for item in items for word in str(item).split(",") if word]


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
