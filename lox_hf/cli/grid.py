"""The hardenings that are tried, and what they may cost: options of the commands that choose."""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lox_hf.cli.options import parse_rank
from lox_hf.cli.words import parse_number, parse_settings, parse_words
from lox_hf.errors import ConfigError

if TYPE_CHECKING:
    from lox_hf.records import Limit

NONE = "none"


def add_grid_options(parser: argparse.ArgumentParser, title: str, *, targets: str) -> "argparse._ArgumentGroup":
    """Add the options.

    Args:
        parser: The command's parser.
        title: What the help calls them.
        targets: The default targets, in words.

    Returns:
        Their group, for what a command has beside them.
    """
    group = parser.add_argument_group(title)
    add = group.add_argument
    add("--rs", nargs="+", metavar="R", help="ranks: numbers, shares of the energy, or full (default: 2,6,full)")
    add("--alphas", nargs="+", metavar="ALPHA", help="strengths (default: 0.25,0.5,0.75,1,1.25)")
    add(
        "--targets",
        nargs="+",
        metavar="WORD",
        help="which weights: all, attention, mlp, no-embeddings, all-linear, a module's name or a regular expression "
        f"(default: {targets})",
    )
    add(
        "--limits",
        nargs="+",
        metavar="MEASURE=MOST",
        help="other limits, such as over_refusal=0.02 kl=0.05, or perplexity=none (rates as shares: 0.02 is 2 points)",
    )
    return group


def parse_grid(options: argparse.Namespace) -> dict[str, Any]:
    """Read what is given of the grid and the limits.

    Args:
        options: Complete options.

    Returns:
        "rs", "alphas", "targets" and "limits", those that are given.

    Raises:
        ConfigError: If a value cannot be understood.
    """
    readers = {"rs": parse_ranks, "alphas": _alphas, "targets": parse_words, "limits": parse_limits}
    return {name: read(value) for name, read in readers.items() if (value := getattr(options, name)) is not None}


def parse_ranks(words: list[str]) -> list[int | float | None]:
    """Ranks to try, each as `parse_rank` takes it, but for 0, which is the base elsewhere.

    Args:
        words: Words of the command line.

    Returns:
        The ranks.

    Raises:
        ConfigError: If one is 0 or cannot be understood.
    """
    ranks = parse_words(words)
    if "0" in ranks:
        raise ConfigError("--rs 0 is none: write full for the full rank, which the reference calls 0.")
    return [parse_rank(word) for word in ranks]


def parse_limits(words: list[str]) -> "list[Limit]":
    """Read limits.

    Args:
        words: MEASURE=MOST, or MEASURE=none for no limit.

    Returns:
        The limits by default, with what the words change of them.

    Raises:
        ConfigError: If a measure has no limit, or a number is none.
    """
    from lox_hf.analysis.limits import DEFAULT_LIMITS

    changes = parse_settings("--limits", words)
    known = [limit.measure for limit in DEFAULT_LIMITS]
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise ConfigError(f"--limits has no measure {', '.join(map(repr, unknown))}; it has {', '.join(known)}.")
    return [
        replace(limit, most=parse_number("--limits", str(changes.get(limit.measure, limit.most)), float))
        for limit in DEFAULT_LIMITS
        if changes.get(limit.measure) != NONE
    ]


def _alphas(words: list[str]) -> list[float]:
    return [parse_number("--alphas", word, float) for word in parse_words(words)]
