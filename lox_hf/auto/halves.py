"""Two halves of the prompts: a choice looks better on what it was chosen by than it is."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from lox_hf.errors import ConfigError
from lox_hf.evaluation.data.prompts import Prompt


class Halves(NamedTuple):
    """Prompts by what they are for.

    Attributes:
        choosing: Candidates are compared on these.
        reporting: What is reported was measured on these, and nothing was chosen by it.
    """

    choosing: tuple[Prompt, ...]
    reporting: tuple[Prompt, ...]


def split_prompts(prompts: Sequence[Prompt]) -> Halves:
    """Split prompts into two halves, harmful and harmless ones each.

    Texts are put in the order of their hashes, and the first half is for choosing: the same prompts are always split
    in the same way, whatever their order, and a prompt that comes twice lies in one half.

    Args:
        prompts: The prompts.

    Returns:
        The halves, each in the order of the prompts.

    Raises:
        ConfigError: If there are fewer than two harmful prompts.

    Example:
        >>> halves = split_prompts([Prompt(text) for text in "abcd"])
        >>> len(halves.choosing), len(halves.reporting)
        (2, 2)
    """
    chosen: set[tuple[str, bool]] = set()
    for harmful in (True, False):
        texts = sorted({prompt.text for prompt in prompts if prompt.harmful is harmful}, key=_hash)
        if harmful and len(texts) < 2:
            raise ConfigError(
                f"There are {len(texts)} different harmful prompts, and one half is chosen by, the other reported on: "
                "pass at least 2, and for figures that say something 100 or more."
            )
        chosen |= {(text, harmful) for text in texts[: (len(texts) + 1) // 2]}
    is_chosen = [(prompt.text, prompt.harmful) in chosen for prompt in prompts]
    pairs = list(zip(prompts, is_chosen, strict=True))
    return Halves(tuple(p for p, first in pairs if first), tuple(p for p, first in pairs if not first))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
