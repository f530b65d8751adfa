"""From a prompt's text to its token ids, with the special tokens that its format means and no others."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private-use characters around a special token's text in a turn.
_OPEN, _CLOSE = "\ue000", "\ue001"
_MARKED = re.compile(f"{_OPEN}(.*?){_CLOSE}", re.DOTALL)
_LONE_MARK = re.compile(f"[{_OPEN}{_CLOSE}]")


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    """Return the special tokens of a tokenizer.

    Args:
        tokenizer: The tokenizer.

    Returns:
        Text by id.
    """
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def mark(special: Mapping[int, str], text: str) -> str:
    """Put marks around every special token's text in what somebody wrote, for `tokenize` to spell it.

    Args:
        special: What `special_tokens` gives.
        text: The text of a turn.

    Returns:
        The text with marks, and with no others than these.
    """
    return _any_of(tuple(special.values())).sub(rf"{_OPEN}\g<0>{_CLOSE}", _LONE_MARK.sub("", text))


def tokenize(tokenizer: "PreTrainedTokenizerBase", special: Mapping[int, str], text: str) -> list[int]:
    """Return the token ids of a prompt, with one BOS where the tokenizer or the text has one, and no EOS put behind.

    Args:
        tokenizer: The tokenizer; it is left as it was.
        special: What `special_tokens` gives.
        text: The prompt; what is marked in it gives ordinary tokens only.

    Returns:
        Token ids.
    """
    with _left_as_it_was(tokenizer):
        return _with_one_bos(tokenizer, _tokens(tokenizer, special, text))


@lru_cache(maxsize=8)
def _any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern for any of the texts, the longest of those that begin alike."""
    longest_first = sorted(filter(str.strip, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _tokens(tokenizer: "PreTrainedTokenizerBase", special: Mapping[int, str], text: str) -> list[int]:
    """Token ids of a text; what is marked in it gives ordinary tokens only."""
    ids: list[int] = []
    for number, piece in enumerate(_MARKED.split(text)):
        is_marked = number % 2 == 1
        options = {"split_special_tokens": True} if is_marked else {}
        found = tokenizer(_LONE_MARK.sub("", piece), add_special_tokens=False, **options)["input_ids"]
        # A vocabulary of whole words has no other spelling of a special token.
        ids += [token for token in found if token not in special] if is_marked else found
    return ids


def _with_one_bos(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> list[int]:
    """The ids with one BOS in front where the text begins with any or the tokenizer itself puts one there."""
    bos = tokenizer.bos_token_id
    written = next((place for place, token in enumerate(ids) if token != bos), len(ids))
    if written or (bos is not None and tokenizer("a")["input_ids"][:1] == [bos]):
        return [bos, *ids[written:]]
    return ids


@contextmanager
def _left_as_it_was(tokenizer: "PreTrainedTokenizerBase") -> Iterator[None]:
    """Give a fast tokenizer's backend its settings back: every call of the tokenizer overwrites them."""
    if not tokenizer.is_fast:
        yield
        return
    backend = tokenizer.backend_tokenizer
    truncation, padding, encode_special = backend.truncation, backend.padding, backend.encode_special_tokens
    try:
        yield
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
        backend.encode_special_tokens = encode_special
