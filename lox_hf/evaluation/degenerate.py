"""Tell what cannot be judged: responses that are empty, repetition or not language."""

import re
import unicodedata
from collections.abc import Callable

# One piece over and over. A short piece has to come ten times, since "no, no, no", "haha" and 0.333333 are meant.
_LOOP = re.compile(r"(.{1,4}?)\1{9,}|(.{5,300}?)\2{3,}", re.DOTALL)
# A loop shorter than this is a flourish: "Aaaaaaaaaaaaah!".
_LOOP_LENGTH = 20
# Most of the text: a long answer that ends in a loop, or a song with its refrain, can still be judged.
_LOOP_SHARE = 0.5
# A hundred words of prose have about sixty different ones, a poem with a refrain about thirty; below a fifth little is
# said. Longer texts repeat more, so that only their first hundred words count; in a short one chance is too strong.
_WORDS_LOOKED_AT = 100
_FEWEST_WORDS = 20
_DISTINCT_SHARE = 0.2
# Numbers of a list, which tell its lines apart although they all say the same.
_LIST_NUMBER = re.compile(r"(^|[.!?:;])\s*\d+[.)](?=\s)", re.MULTILINE)

# One unreadable character in ten characters leaves a text readable, as a misprint does.
_UNREADABLE_SHARE = 0.1
_UNREADABLE = {"Cc", "Cn", "Co", "Cs"}  # control, unassigned, private use, surrogate
# Bytes of UTF-8 that were read as Latin-1 or Windows-1252: a leading byte, then continuation bytes. French or German
# come out with one letter in twenty like this and can be read; other scripts come out with all of them.
_MOJIBAKE = re.compile(
    "[\u00c2-\u00f4][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc"
    "\u2013\u2014\u2018-\u201e\u2020-\u2022\u2026\u2030\u2039\u203a\u20ac\u2122]+"
)
_MOJIBAKE_SHARE = 0.25
# Code, formulas and tables have more letters and digits among their signs than this.
_WORD_SHARE = 0.1
# Words of two scripts occur ("USB\u043e\u043c"), but seldom; of the pieces of a random vocabulary most are.
_MIXED_SHARE = 0.25
# What is written without spaces, or stands in formulas, joins Latin letters: "\u7528Python\u5199", "\u0394x".
_JOINS_LATIN = {"EAST ASIAN", "GREEK", "THAI", "LAO", "KHMER", "MYANMAR"}
_EAST_ASIAN = {"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "BOPOMOFO", "HANGUL", "HALFWIDTH", "FULLWIDTH"}
# In words people can say, few letters stand in a row of four consonants or in a word without a vowel: at most one in
# fifteen where a language is written in Latin letters, and as few in code. Of random letters two in five do.
_LATIN_WORD = re.compile("[a-zA-Z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff]+")
_VOWELS = set("aeiouy\u00e6\u00f8\u0153\u0131\u0259")
_CONSONANT_ROW = 4
_NO_VOWEL = 3
_UNSPEAKABLE_SHARE = 0.35
_FEWEST_LETTERS = 30  # "Angstschwei\u00df", "mkdir" and "xyz" are answers


def degenerate_reason(text: str) -> str | None:
    """Say why a response is degenerate: empty, repetition or not language.

    It counts characters and words, knows no dictionary, and is meant to err on the side of a response: short answers,
    code, formulas, tables, poems, other languages, invented words and what a limit of tokens cut off can be judged.

    It cannot see what only reading shows: fluent nonsense made of real words, an answer to another question, random
    letters of another script than Latin, random words of several languages. It takes for repetition what was asked for
    as repetition ("Write 'hello' fifty times").

    Args:
        text: The response.

    Returns:
        The reason, or None where the response can be judged.

    Example:
        >>> degenerate_reason("the the the the the the the the the the the the")
        'repetition: the same words or characters over and over'
        >>> degenerate_reason("No.") is None
        True
    """
    # The limit of tokens can cut a character of several bytes in two, which leaves one replacement character.
    text = text.removesuffix("\ufffd")
    return next((reason for reason, found_in in _REASONS if found_in(text)), None)


def _is_empty(text: str) -> bool:
    return not any(_is_word_character(c) or _is_picture(c) for c in text)


def _is_looping(text: str) -> bool:
    plain = " ".join(_LIST_NUMBER.sub(r"\1", text).casefold().split())
    # Lines drawn with signs, as under the head of a table, are no loops.
    loops = [loop[0] for loop in _LOOP.finditer(plain) if any(map(str.isalnum, loop[0]))]
    return sum(len(loop) for loop in loops if len(loop) >= _LOOP_LENGTH) > _LOOP_SHARE * len(plain)


def _has_few_words(text: str) -> bool:
    # With the signs that cling to them, which keeps apart what code and tables do with one word; without numbers.
    words = [word for word in text.casefold().split() if any(map(str.isalpha, word))][:_WORDS_LOOKED_AT]
    return len(words) >= _FEWEST_WORDS and len(set(words)) < _DISTINCT_SHARE * len(words)


def _is_unreadable(text: str) -> bool:
    visible = _without_spaces(text)
    unreadable = sum(c == "\ufffd" or unicodedata.category(c) in _UNREADABLE for c in visible)
    return unreadable > _UNREADABLE_SHARE * len(visible)


def _is_mojibake(text: str) -> bool:
    return sum(map(len, _MOJIBAKE.findall(text))) > _MOJIBAKE_SHARE * len(_without_spaces(text))


def _is_signs(text: str) -> bool:
    visible = _without_spaces(text)
    return sum(_is_word_character(c) or _is_picture(c) for c in visible) < _WORD_SHARE * len(visible)


def _mixes_scripts(text: str) -> bool:
    words = re.findall(r"[^\W\d_]+", text)
    return sum(map(_is_mixed, words)) > max(1, _MIXED_SHARE * len(words))  # a single one is a slip


def _is_mixed(word: str) -> bool:
    scripts = {_script(c) for c in word}
    if len(scripts - {"LATIN"}) == 1 and scripts & _JOINS_LATIN:
        return False
    return len(scripts) > 1


def _is_unspeakable(text: str) -> bool:
    letters = sum(map(str.isalpha, text))
    unspeakable = sum(map(_unspeakable_letters, _LATIN_WORD.findall(text)))
    return letters >= _FEWEST_LETTERS and unspeakable > _UNSPEAKABLE_SHARE * letters


def _unspeakable_letters(word: str) -> int:
    """Count the letters of a Latin word that stand in a long row of consonants, or all if it has no vowel."""
    if word.isupper():  # acronyms, constants, DNA
        return 0
    plain = filter(str.isalpha, unicodedata.normalize("NFD", word.casefold()))
    rows = "".join(" " if c in _VOWELS else c for c in plain).split(" ")
    shortest = _CONSONANT_ROW if len(rows) > 1 else _NO_VOWEL
    return sum(len(row) for row in rows if len(row) >= shortest)


def _is_word_character(c: str) -> bool:
    """Whether it is a letter, the mark of a letter or a digit, of any script."""
    return unicodedata.category(c)[0] in "LMN"


def _is_picture(c: str) -> bool:
    """Whether it is a symbol that says something alone, as emoji do."""
    return unicodedata.category(c) == "So" and c != "\ufffd"


def _script(letter: str) -> str:
    """Return the first word of the letter's name in Unicode, which is its script."""
    script = unicodedata.name(letter, "UNKNOWN").split()[0]
    return "EAST ASIAN" if script in _EAST_ASIAN else script


def _without_spaces(text: str) -> str:
    return "".join(text.split())


_REASONS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("not language: characters that cannot be read", _is_unreadable),
    ("empty: nothing but white space and punctuation", _is_empty),
    ("repetition: the same words or characters over and over", _is_looping),
    ("repetition: very few different words", _has_few_words),
    ("not language: bytes read in the wrong encoding", _is_mojibake),
    ("not language: almost no letters among the signs", _is_signs),
    ("not language: scripts mixed within words", _mixes_scripts),
    ("not language: letters nobody could pronounce", _is_unspeakable),
)
