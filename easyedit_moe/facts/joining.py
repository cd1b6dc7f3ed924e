"""What stands between a prompt and its answer: one space, unless the texts say otherwise; pure text, no tokens."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace

from easyedit_moe.facts.scripts import in_spaced_word, is_ignorable, without_spaces

_CLOSES = {
    '"': '"', "'": "'", "\uff02": "\uff02", "\uff07": "\uff07", "”": "“„”", "’": "‘‚’", "“": "„", "‘": "‚",
    "»": "«»", "«": "»", "›": "‹›", "‹": "›",
}  # fmt: skip
"""The quotation marks that close a quotation, and those that may have opened it; languages differ in this."""
_OPENS = frozenset("\"'\uff02\uff07”’“‘„‚»«›‹‟‛")
_GUILLEMETS = frozenset("«»‹›")
_CLOSING = frozenset(".,;:!?%…‰‱°،؛؟۔।॥·׃։።፣")
"""Signs before which no space stands, besides those that Unicode calls closing."""
_INFIXES = frozenset("/\\=+_~-\u2010\u2011\u2012")
"""Marks that join what stands before and behind them, where nothing divides them from the first."""
_APOSTROPHES = "'’\uff07"
_CLITIC = re.compile(
    rf"(?:[{_APOSTROPHES}](?:s|re|ve|ll|d|m|em)|n[{_APOSTROPHES}]t)(?![\w{_APOSTROPHES}-])", re.IGNORECASE
)
"""Endings that are written to the word before them."""
_TEE = re.compile(rf"[{_APOSTROPHES}]t(?!\w)", re.IGNORECASE)
_NEGATED = re.compile(
    r"\b(?:ain|aren|can|couldn|didn|doesn|don|hadn|hasn|haven|isn|mayn|mightn|mustn|needn|oughtn|shan|shouldn|wasn|"
    r"weren|won|wouldn)\Z",
    re.IGNORECASE,
)
"""Before 't, which begins words of their own in Dutch."""
ELIDED = (
    "l d j m t s n c qu jusqu lorsqu puisqu quoiqu quelqu presqu entr aujourd dell all nell sull dall coll un quell "
    "quest bell sant tutt mezz anch senz gl o"
)
"""Words that lose their vowel before the next word (French, Italian, Catalan, Irish names), as written before ' ."""
_ELISION = re.compile(rf"(?<!\w)(?:{'|'.join(ELIDED.split())})[{_APOSTROPHES}]\Z", re.IGNORECASE)
_PATH = re.compile(r"\.?[\w/\\]")


@dataclass(frozen=True)
class _Quote:
    """A quotation that is open: its mark, and whether there is a space on the inner side of it."""

    mark: str
    spaced: bool


def bare_prompt(prompt: str) -> str:
    """The prompt without spaces and tabs at its end, which are no part of what is asked; line breaks stay."""
    return prompt.rstrip(" \t\u00a0")


def bare_target(target: str) -> str:
    """The target without the space around it; a line break or tab at its beginning is part of the answer and stays."""
    text = target.rstrip()
    led = text[: len(text) - len(text.lstrip())]
    return text if any(unicodedata.category(char) != "Zs" for char in led) else text[len(led) :]


def join(prompt: str, target: str) -> str:
    """The text of a prompt and its answer, whatever space either brought along."""
    return bare_prompt(prompt) + separator(prompt, target) + bare_target(target)


def separator(prompt: str, target: str) -> str:
    """A space or nothing: what stands between `bare_prompt` and `bare_target`.

    Nothing after or before a line break, in scripts without spaces, after an opening quote or bracket or a sign such as
    ¿ or $, and before a closing one, a mark that ends a sentence or an ending such as 's. Whether a quotation mark
    opens or closes follows from its place and from those before it. A quotation that has spaces inside («_x_») keeps
    them, the no-break space that the prompt ends with included.
    """
    text, answer = bare_prompt(prompt), bare_target(target)
    before, after = text[-1:], answer[:1]
    if not before or not after or before.isspace() or after.isspace():
        return ""
    quotes, opened = _open_quotes(text)
    if opened:
        return _inner_space(quotes[-1], prompt[len(text) :])
    if _is_ending(text, answer):
        return ""
    if after in _CLOSES and _closes(quotes, answer):
        return " " if quotes and quotes[-1].spaced else ""
    if _is_opening(text, answer) or _is_closing(text, answer):
        return ""
    return "" if _runs_on(text, answer) else " "


def _inner_space(quote: _Quote, written: str) -> str:
    """The space behind an opening mark: where the text has the habit, or has written one there on purpose."""
    if quote.mark in _GUILLEMETS and written:
        return "\u00a0" if "\u00a0" in written else " "
    return " " if quote.spaced else ""


def _open_quotes(text: str) -> tuple[list[_Quote], bool]:
    """The quotations that are open at the end of a text, innermost last, and whether its last character opens one."""
    quotes: list[_Quote] = []
    habit: dict[str, bool] = {}
    opened = False
    for place, char in enumerate(text):
        opened = False
        if char not in _OPENS:
            continue
        left, right = text[place - 1 : place], text[place + 1 : place + 2]
        if char in _APOSTROPHES and in_spaced_word(left) and in_spaced_word(right):
            continue
        match = _partner(quotes, char, left)
        if match is not None and not (right and _begins_word(left, right)):
            del quotes[match:]
        elif _may_open(char, left, text[:place]):
            habit[char] = right.isspace() if right else habit.get(char, False)
            quotes.append(_Quote(char, habit[char]))
            opened = True
    if opened and quotes[-1].mark not in _GUILLEMETS:
        quotes[-1] = replace(quotes[-1], spaced=False)
    return quotes, opened


def _begins_word(left: str, right: str) -> bool:
    return (not left or left.isspace()) and in_spaced_word(right)


def _partner(quotes: list[_Quote], char: str, left: str) -> int | None:
    """Index of the innermost open quotation that a mark closes; a space before it only where there is one inside."""
    for index in reversed(range(len(quotes))):
        quote = quotes[index]
        if quote.mark in _CLOSES.get(char, ""):
            alone = char in "»›" and quote.mark != char
            return index if alone or quote.spaced or not left.isspace() else None
    return None


def _may_open(char: str, left: str, before: str) -> bool:
    """Whether a mark that closes nothing opens a quotation, rather than being an apostrophe or an inch sign."""
    if char in "“‘«‹„‚‟‛" or not left or left.isspace() or without_spaces(left):
        return True
    return not (in_spaced_word(left) or left in ".!?…,;" or unicodedata.category(left) in ("Pe", "Pf"))


def _is_ending(text: str, answer: str) -> bool:
    """Whether the answer begins with an ending of the prompt's last word, such as 's."""
    if not in_spaced_word(text[-1]):
        return False
    if _TEE.match(answer):
        return _NEGATED.search(text) is not None
    return _CLITIC.match(answer) is not None


def _closes(quotes: list[_Quote], answer: str) -> bool:
    """Whether the answer begins with a mark that closes a quotation of the prompt, or with an apostrophe."""
    char, right = answer[0], answer[1:2]
    if _partner(quotes, char, "") is None:
        return char not in "“‘«‹" and (not right or right.isspace())
    if char not in _CLOSES[char] and char in "“‘":
        return True
    if in_spaced_word(right) or answer.count(char) % 2 == 0:
        return not right or right.isspace() or right in ".,;:!?)"
    return True


def _is_opening(text: str, answer: str) -> bool:
    """Whether the prompt ends with a mark that the answer follows without a space."""
    before, left, after = text[-1], text[-2:-1], answer[0]
    if before in "¿¡" or unicodedata.category(before) == "Ps":
        return True
    if unicodedata.category(before) == "Sc":
        # "5 €" is an amount already.
        return not text[:-1].rstrip()[-1:].isdigit()
    if before == "#":
        return after.isdigit() and not in_spaced_word(left)
    if before == "@":
        return in_spaced_word(left)
    if before in _INFIXES:
        # Only where the mark is written to what it follows: "path/", "twenty-", "2+2=", but "Answer -".
        return bool(left) and not left.isspace()
    return _ELISION.search(text) is not None


def _is_closing(text: str, answer: str) -> bool:
    """Whether the answer begins with a mark that stands directly behind the prompt's last word."""
    first = answer[0]
    if first in ".!?:%":
        # ".NET", "../x", ":)", "!=" and "%d" are words of their own.
        return not (_PATH.match(answer[1:]) or answer[1:2] in ("(", ")", "=")) or answer.startswith("::")
    return first in _CLOSING or unicodedata.category(first) == "Pe" or _is_wide_mark(first)


def _is_wide_mark(char: str) -> bool:
    """Whether a mark brings its space along, as those of Chinese and Japanese do."""
    return unicodedata.east_asian_width(char) in "WF" and unicodedata.category(char)[0] == "P"


def _runs_on(text: str, answer: str) -> bool:
    """Whether the prompt is in a script without spaces, and goes on in it or breaks off at one of its letters.

    Fullwidth letters and digits are written into such text without spaces.
    """
    after = answer[0]
    if _is_wide_mark(text[-1]):
        return True
    letters = [char for char in text if char.isalnum()]
    last = letters[-1] if letters else ""
    end = next((c for c in reversed(text) if unicodedata.category(c)[0] != "M" and not is_ignorable(c)), "")
    if end == last and last.isdecimal() and without_spaces(after):
        # A number is of the text's script: 2025年.
        words = [char for char in letters if not char.isdecimal()]
        return not words or without_spaces(words[-1]) or _is_fullwidth(last)
    if _is_fullwidth(last):
        return end == last and without_spaces(after)
    return without_spaces(last) and (end == last or without_spaces(after) or _is_fullwidth(after))


def _is_fullwidth(char: str) -> bool:
    return unicodedata.name(char, "").startswith("FULLWIDTH") if char else False
