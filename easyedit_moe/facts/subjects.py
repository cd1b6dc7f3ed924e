"""Where a text names a subject: one search for every place that asks."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from easyedit_moe.facts.joining import ELIDED
from easyedit_moe.facts.scripts import in_word, is_ignorable, without_spaces

_SAME = {
    **dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc\u0060\u00b4\u2032\uff07", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb\u2033\uff02", '"'),
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"),
}
"""Apostrophes, quotes and hyphens that people write for each other."""
_APOSTROPHES = frozenset("'\u2018\u2019\u201b\u02bc\u0060\u00b4\u2032\uff07")
_ELIDED = frozenset(ELIDED.split()) - {"o"}  # O'Neill is one name
_SYLLABLES = frozenset("an ang ai ao en eng er ou".split())
"""Chinese syllables that an apostrophe divides from the one before, as in Xi'an; what else follows is an ending."""
_NUMBER_MARKS = frozenset(".,:'’٫٬·\u066b\u066c\u2044")
_NUMBER_SPACES = frozenset("\u00a0\u2009\u202f")
_MINUS = frozenset("-\u2212\uff0d")
_BRACKETS = frozenset(("Ps", "Pe", "Pi", "Pf"))
_JAPANESE_TAILS = frozenset("ーｰっッぁぃぅぇぉゃゅょァィゥェォャュョﾞﾟゝヽ々")
"""Characters that go on with the one before them, though their scripts put no space between words."""
_NEAR = 64
"""Characters on either side that decide whether a word begins or ends."""
_ZERO_WIDTH_JOINER = "\u200d"

_PARTICLES = (
    "은 는 이 가 을 를 의 에 에서 에게 에게서 께 께서 한테 한테서 와 과 랑 "
    "이랑 하고 로 으로 로서 으로서 로써 으로써 로부터 으로부터 도 만 까지 부터 마저 조차 밖에 보다 "
    "처럼 같이 만큼 마다 나 이나 이며 이고 란 이란 라는 이라는 라고 이라고 라면 이라면 인 이다 "
    "입니다 이었다 였다 였습니다 이었습니다 들 씨 님"
)
_KOREAN_TAIL = re.compile(rf"(?:{'|'.join(sorted(_PARTICLES.split(), key=len, reverse=True))}){{1,3}}")
"""What Korean writes to a name without a space: particles, forms of "to be", plural and titles, up to three of them."""
_SEMITIC_PREFIXES = {"ARABIC": frozenset("وفبكل"), "HEBREW": frozenset("ומבלהכש")}
"""Letters that are words ("and", "in", "to", ...) written to the next word; up to two of them."""


@dataclass(frozen=True)
class Folded:
    """A text with equal forms made the same, and where each of its characters comes from in the original."""

    text: str
    folded: str
    places: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, text: str, ignore_case: bool = False) -> Folded:
        """``text`` decomposed by compatibility (NFKD), spaces as one, apostrophes and hyphens alike."""
        chars: list[tuple[str, tuple[int, int]]] = []
        for place, char in enumerate(text):
            if is_ignorable(char):
                continue
            if char.isspace():
                if chars and chars[-1][0] == " ":
                    chars[-1] = " ", (chars[-1][1][0], place + 1)
                else:
                    chars.append((" ", (place, place + 1)))
                continue
            chars += [(part, (place, place + 1)) for part in _parts(char, ignore_case)]
        _reorder(chars)
        return cls(text, "".join(char for char, _ in chars), tuple(place for _, place in chars))


def find_subject(text: str, subject: str) -> tuple[int, int] | None:
    """Character span of the first place where ``text`` names ``subject`` as whole words; None where it does not.

    Forms that mean the same text are equal: composed, decomposed and compatibility forms (ligatures, fullwidth letters,
    subscripts), all kinds of spaces and any number of them, of apostrophes, of quotes, of hyphens; characters without
    width are passed over. Case counts. The span is of whole characters of ``text``.

    A whole word has no letter, digit or mark beside it, and is no part of a number or of a name such as ASP.NET or C++.
    There is no such border to ask for beside scripts without spaces (Chinese, Thai, ...), and what languages write to a
    word does not count: endings behind an apostrophe, elided words (l'), Korean particles, Arabic and Hebrew prefixes.
    """
    return next(find_all(Folded.of(text), Folded.of(subject.strip()).folded), None)


def find_all(text: Folded, wanted: str) -> Iterator[tuple[int, int]]:
    """Spans where a text names a subject, which is given in its folded form; see `find_subject`."""
    start = text.folded.find(wanted) if wanted.strip() else -1
    while start >= 0:
        span = _span(text, start, start + len(wanted))
        if span is not None and _is_whole_word(text.text, *span):
            yield span
        start = text.folded.find(wanted, start + 1)


def mentions(text: str, subject: str) -> bool:
    """Whether ``text`` names ``subject``; see `find_subject`."""
    return find_subject(text, subject) is not None


def nearest_span(text: str, subject: str) -> str:
    """The words of ``text`` that look most like ``subject``; empty where none does.

    In scripts without spaces, every character counts as a word.
    """
    words, wanted = _words(text), _plain(subject)
    count = max(1, len(_words(subject)))
    fewer = count - 1 if count > 2 or (count == 2 and " " in subject.strip()) else count
    best, found = 0.5, ""
    matcher = difflib.SequenceMatcher(None, "", wanted)
    for size in sorted({count, count + 1, fewer}, key=lambda size: abs(size - count)):
        for first, last in zip(words, words[size - 1 :], strict=False):
            span = _without_marks(text[first[0] : last[1]])
            matcher.set_seq1(_plain(span))
            # As many words as the subject has are the better guess.
            likeness = matcher.ratio() - (0.05 if size != count else 0.0)
            if likeness > best or (likeness == best and not found):
                best, found = likeness, span
    return found


def _parts(char: str, ignore_case: bool) -> str:
    parts = unicodedata.normalize("NFKD", _SAME.get(char, char))
    if ignore_case:
        parts = unicodedata.normalize("NFKD", parts.casefold())
    return "".join(_SAME.get(part, part) for part in parts)


def _reorder(chars: list[tuple[str, tuple[int, int]]]) -> None:
    """Put the marks of each letter into canonical order, as decomposing the whole text would."""
    start = 0
    while start < len(chars):
        end = start
        while end < len(chars) and unicodedata.combining(chars[end][0]):
            end += 1
        if end - start > 1:
            chars[start:end] = sorted(chars[start:end], key=lambda item: unicodedata.combining(item[0]))
        start = max(end, start + 1)


def _span(text: Folded, start: int, end: int) -> tuple[int, int] | None:
    """The original characters of a part of a folded text; None where it has only a part of one, or of a letter."""
    places = text.places
    following = text.folded[end : end + 1]
    if following and unicodedata.category(following)[0] == "M":
        return None
    if (start and places[start - 1] == places[start]) or (following and places[end - 1] == places[end]):
        return None
    inside = places[start:end]
    return min(first for first, _ in inside), max(last for _, last in inside)


def _is_whole_word(text: str, start: int, end: int) -> bool:
    parts = text[max(0, start - _NEAR) : start], text[start:end], text[end : end + _NEAR]
    before, subject, after = (_visible(part) for part in parts)
    if _ZERO_WIDTH_JOINER in (text[start - 1 : start], text[end : end + 1]) and not in_word(subject[-1]):
        return False
    if "\U0001f3fb" <= after[:1] <= "\U0001f3ff":
        return False
    return _begins(before, subject) and _ends(before, subject, after)


def _visible(text: str) -> str:
    return "".join(char for char in text if not is_ignorable(char))


def _begins(before: str, subject: str) -> bool:
    """Whether a word begins between the text before a subject and the subject."""
    last, first = before[-1:], subject[0]
    if not last or without_spaces(last) or without_spaces(first):
        return True
    if in_word(last):
        return _is_apart(subject, first) or _is_semitic_prefix(before)
    if not in_word(first):
        return True
    previous = before[-2:-1]
    if first.isdigit() and _in_number(previous, last, subject, start=True):
        return False
    if last in _APOSTROPHES and in_word(previous):
        return _last_word(before[:-1]).casefold() in _ELIDED
    return not (last == "." and previous.isalpha() and _is_letter(subject))


def _ends(before: str, subject: str, after: str) -> bool:
    """Whether a word ends between a subject and the text after it."""
    last, first = subject[-1], after[:1]
    if first in _JAPANESE_TAILS and first and without_spaces(last):
        return False
    if not first or without_spaces(first) or without_spaces(last):
        return not (first and unicodedata.category(first)[0] == "M")
    if in_word(first):
        return _is_apart(subject, last) or _is_korean_tail(after)
    if not in_word(last):
        return True
    if _is_letter(subject) and (after.startswith("++") or (first == "#" and not after[1:2].isalnum())):
        return False
    following = after[1:2]
    if last.isdigit() and _in_number(following, first, after[1:], start=False):
        return False
    if first in _APOSTROPHES and in_word(following):
        return _is_ending(subject, after[1:])
    return not (first == "." and following.isalpha() and _is_letter(subject))


def _is_apart(subject: str, end: str) -> bool:
    """Whether the first or last character of a subject divides it from a letter beside it, as brackets do.

    Others, as in .NET or C++, are part of the name; a subject of nothing but signs stands anywhere.
    """
    if in_word(end):
        return False
    return unicodedata.category(end) in _BRACKETS or end in "\"'" or not any(in_word(char) for char in subject)


def _is_letter(subject: str) -> bool:
    """Whether a subject is one letter, which beside a point is part of initials."""
    return len(subject) == 1 and subject.isalpha()


def _in_number(other: str, mark: str, rest: str, start: bool) -> bool:
    """Whether a mark, or a narrow space between groups of three digits, makes one number of the digits around it."""
    if mark in _MINUS and start:
        return not other or other.isspace()
    if mark in _NUMBER_SPACES:
        digits = re.match(r"\d*", rest)
        return other.isdigit() and digits is not None and len(digits[0]) == 3
    if mark not in _NUMBER_MARKS:
        return False
    return other.isdigit() or (start and mark in ".," and (not other or other.isspace()))


def _is_ending(subject: str, after: str) -> bool:
    """Whether what follows an apostrophe is an ending ('s, Turkish 'da) rather than the rest of the name (O'Neill)."""
    letters = re.match(r"[^\W\d_]*", after)
    ending = letters[0] if letters else ""
    if after[len(ending) : len(ending) + 1] in _APOSTROPHES and in_word(after[len(ending) + 1 : len(ending) + 2]):
        return False
    if ending.upper() == ending and subject.upper() == subject:
        return len(ending) <= 2
    return 0 < len(ending) <= 4 and ending.islower() and ending not in _SYLLABLES


def _last_word(text: str) -> str:
    found = re.search(r"[^\W\d_]+\Z", text)
    return found[0] if found else ""


def _is_korean_tail(after: str) -> bool:
    run = re.match(r"[가-힣]+", unicodedata.normalize("NFC", after))
    if run is None or in_word(unicodedata.normalize("NFC", after)[run.end() : run.end() + 1]):
        return False
    return _KOREAN_TAIL.fullmatch(run[0]) is not None


def _is_semitic_prefix(before: str) -> bool:
    """Whether the letters before a subject are prefixes, at most two, at the beginning of a word."""
    run = re.search(r"[\w\u0591-\u05c7\u064b-\u0652]+\Z", before)
    letters = [char for char in run[0] if char.isalnum()] if run else []
    script = unicodedata.name(letters[-1], "").split(" ")[0] if letters else ""
    return 0 < len(letters) <= 2 and set(letters) <= _SEMITIC_PREFIXES.get(script, frozenset())


def _words(text: str) -> list[tuple[int, int]]:
    """Spans of words; of single characters, with their marks, in scripts without spaces."""
    spans: list[tuple[int, int]] = []
    going_on, single = False, False
    for place, char in enumerate(text):
        if char.isspace():
            going_on = False
            continue
        mark = unicodedata.category(char)[0] == "M" or is_ignorable(char)
        if going_on and (mark or not (single or without_spaces(char))):
            spans[-1] = spans[-1][0], place + 1
        else:
            spans.append((place, place + 1))
        single, going_on = single if mark else without_spaces(char), True
    return spans


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", _visible(text)).casefold()


def _without_marks(text: str) -> str:
    """Without punctuation at both ends, but for a point or sign that begins a name (.NET, @ana)."""
    while text and unicodedata.category(text[-1])[0] == "P":
        text = text[:-1]
    while text and unicodedata.category(text[0])[0] == "P" and not (text[0] in ".@#" and text[1:2].isalnum()):
        text = text[1:]
    return text
