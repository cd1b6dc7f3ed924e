"""What stands between a prompt and its answer: one space, unless the texts say otherwise; pure text, no tokens."""

from __future__ import annotations

import unicodedata

_WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "YI ")
"""How the Unicode names of letters begin whose scripts put no space between words."""
_OPENING = frozenset("¿¡$£€¥#@")
"""Signs after which no space follows, besides those that Unicode calls opening."""
_CLOSING = frozenset(".,;:!?%…")
"""Signs before which no space stands, besides those that Unicode calls closing."""
_STRAIGHT = '"'


def bare_prompt(prompt: str) -> str:
    """The prompt without spaces and tabs at its end, which are no part of what is asked; line breaks stay."""
    return prompt.rstrip(" \t\u00a0")


def separator(prompt: str, target: str) -> str:
    """A space or nothing: what stands between `bare_prompt` and a target without the space around it.

    Nothing after a line break, in scripts without spaces, after an opening quote or bracket or a sign such as $, and
    before a closing one or a mark that ends a sentence. A straight quote is opening or closing by those before it.
    """
    before, after = bare_prompt(prompt)[-1:], target.strip()[:1]
    if not before or not after or before.isspace():
        return ""
    opened = bare_prompt(prompt).count(_STRAIGHT) % 2 == 1
    if before == _STRAIGHT and opened:
        return ""
    if after == _STRAIGHT:
        return "" if opened else " "
    if before in _OPENING or unicodedata.category(before) in ("Ps", "Pi"):
        return ""
    if after in _CLOSING or unicodedata.category(after) in ("Pe", "Pf"):
        return ""
    return "" if _runs_on(bare_prompt(prompt), after) else " "


def _runs_on(prompt: str, after: str) -> bool:
    """Whether the prompt is in a script without spaces, and goes on in it or breaks off at one of its letters."""
    last = next((char for char in reversed(prompt) if char.isalnum()), "")
    if not _without_spaces(last):
        return False
    return prompt.endswith(last) or unicodedata.east_asian_width(prompt[-1]) in "WF" or _without_spaces(after)


def _without_spaces(char: str) -> bool:
    # Combining signs and digits of these scripts have such names, too.
    return bool(char) and unicodedata.name(char, "").startswith(_WITHOUT_SPACES)
