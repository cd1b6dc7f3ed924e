"""What letters say about words: which scripts put no space between them, and which characters belong to a word."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

_WITHOUT_SPACES = (
    "CJK", "IDEOGRAPHIC", "KANGXI", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER",
    "MYANMAR", "TIBETAN", "YI ", "TAI LE", "NEW TAI LUE", "TAI THAM", "TAI VIET", "JAVANESE", "BALINESE",
)  # fmt: skip
"""How the Unicode names of letters begin whose scripts put no space between words."""


@lru_cache(maxsize=4096)
def without_spaces(char: str) -> bool:
    """Whether a letter, sign or digit is of a script that puts no space between words (Chinese, Japanese, Thai, ...).

    Punctuation is of no script.
    """
    if not char or unicodedata.category(char)[0] in "PZ":
        return False
    return unicodedata.name(char, "").startswith(_WITHOUT_SPACES)


def in_word(char: str) -> bool:
    """Whether a character is part of a word: a letter, digit, underscore, or a mark that combines with one."""
    return bool(char) and (char.isalnum() or char == "_" or unicodedata.category(char)[0] == "M")


def in_spaced_word(char: str) -> bool:
    """Whether a character is part of a word that has spaces around it."""
    return in_word(char) and not without_spaces(char)


@lru_cache(maxsize=4096)
def is_ignorable(char: str) -> bool:
    """Whether a character is without width and meaning of its own: joiners, soft hyphens, direction marks, variants."""
    return bool(char) and (unicodedata.category(char) == "Cf" or char == "\u034f" or _is_variant(char))


def _is_variant(char: str) -> bool:
    return "\ufe00" <= char <= "\ufe0f" or "\U000e0100" <= char <= "\U000e01ef" or "\u180b" <= char <= "\u180d"
