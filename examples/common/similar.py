"""Near duplicates among prompts, so that what is tested was not trained on in other words."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence

# Two prompts are near duplicates where they share more than this of all their words (Jaccard).
NEAR = 0.5
WORD = re.compile(r"[a-z0-9]+")


def words(text: str) -> frozenset[str]:
    """Return the words of a text, in small letters."""
    return frozenset(WORD.findall(text.casefold()))


def near(one: frozenset[str], other: frozenset[str]) -> bool:
    """Tell whether two prompts, as their words, are near duplicates."""
    shared = len(one & other)
    return shared > NEAR * (len(one) + len(other) - shared)


def clusters(texts: Sequence[str]) -> list[list[str]]:
    """Group texts so that near duplicates, and theirs in turn, come together."""
    groups: list[list[tuple[str, frozenset[str]]]] = []
    for text in texts:
        item = (text, words(text))
        joined = [group for group in groups if any(near(item[1], other) for _, other in group)]
        groups = [group for group in groups if group not in joined]
        groups.append([item, *(member for group in joined for member in group)])
    return [[text for text, _ in group] for group in groups]


def halve(texts: Sequence[str], seed: int) -> list[str]:
    """Return about half of the texts, by whole clusters: none of it is near any of the rest."""
    groups = clusters(texts)
    half: list[str] = []
    for group in random.Random(seed).sample(groups, len(groups)):
        if len(half) + len(group) <= len(texts) / 2:
            half += group
    return half


def near_any(text: str, known: Iterable[frozenset[str]]) -> bool:
    """Tell whether a prompt is a near duplicate of one that is known by its words."""
    found = words(text)
    return any(near(found, other) for other in known)
