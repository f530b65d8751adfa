"""Which model the aligned one was made from: what the user says, or what the model's own files name."""

import re
from pathlib import Path

from lox_hf.errors import ConfigError
from lox_hf.hub_files import Resolved
from lox_hf.records import Choice
from lox_hf.weights.folder import is_adapter, named_base, named_relation

FLAG = "--base-model"
NO_ALIGNMENT = ("adapter", "merge", "quantized")
"""Relations of the Hub's cards that are not fine-tuning: what lies between the two models is no alignment."""
_ALIGNED = re.compile(r"[-_](?:instruct|chat|it|sft|dpo|rlhf|ppo|orpo|kto|aligned|safe)(?=[-_.]|$)", re.IGNORECASE)
_DATE = re.compile(r"-\d{4}$")


def find_base(aligned: Resolved, given: str | None) -> Choice:
    """Settle the base.

    Args:
        aligned: The aligned model's files.
        given: The base that the user names; None takes what the files name.

    Returns:
        The base, and where it is named.

    Raises:
        ConfigError: If the aligned model is an adapter, if no file names a base, if several are named, or if the card
            says that what lies between the two is no alignment.

    Example:
        >>> print(find_base(resolve("org/aligned"), None))  # doctest: +SKIP
        base      org/base (named by README.md; --base-model)
    """
    name = aligned.reference.name_or_path
    if is_adapter(aligned.folder):
        raise ConfigError(
            f"'{name}' is a PEFT adapter, which is the change alignment made and needs no base: `lox-hf harden` "
            "hardens it as it is. To choose its settings, merge it into its model first."
        )
    if given:
        return Choice("base", given, FLAG)
    found = named_base(aligned.folder)
    if found is None:
        raise ConfigError(_unnamed(name))
    base, file = found
    relation = named_relation(aligned.folder).lower()
    if relation in NO_ALIGNMENT:
        raise ConfigError(
            f"{file} of '{name}' names '{base}' as its base, but as base_model_relation: {relation}, so what lies "
            f"between the two is no alignment. Say which model was there before alignment: {FLAG}."
        )
    return Choice("base", base, f"named by {file}; {FLAG}")


def likely_bases(name: str) -> list[str]:
    """Guess what a model was made from by how models are called: suffixes of alignment are taken off.

    Nothing is looked up, and nothing is used without being asked for.

    Args:
        name: A model's name.

    Returns:
        Names, the likeliest first.

    Example:
        >>> likely_bases("meta-llama/Llama-2-7b-chat-hf"), likely_bases("Qwen/Qwen3-4B-Instruct-2507")
        (['meta-llama/Llama-2-7b-hf'], ['Qwen/Qwen3-4B', 'Qwen/Qwen3-4B-Base'])
    """
    bare = _ALIGNED.sub("", name)
    dated = _DATE.sub("", bare)
    if bare == name:
        return [f"{name}-Base"]
    if dated == bare and bare.endswith("-hf"):
        return [bare]
    return list(dict.fromkeys((dated, f"{dated}-Base")))


def _unnamed(name: str) -> str:
    """What is said where no file names a base."""
    if Path(name).expanduser().is_dir():
        hint = "the folder or Hub id of the model that it was aligned from"
    else:
        guesses = " or ".join(f"'{guess}'" for guess in likely_bases(name))
        hint = f"by its name it may be {guesses}, but look at its page, since a wrong base hardens nonsense"
    return f"The files of '{name}' do not name the model that it was made from. Say which one with {FLAG}: {hint}."
