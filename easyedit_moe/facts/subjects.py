"""Where a text names a subject: one search for every place that asks."""

from __future__ import annotations

import difflib
import re
import unicodedata

_SAME = {
    **dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc\u0060\u00b4\u2032\uff07", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb\u2033\uff02", '"'),
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"),
}
"""Apostrophes, quotes and hyphens that people write for each other."""


def find_subject(text: str, subject: str) -> tuple[int, int] | None:
    """Character span of the first place where ``text`` names ``subject`` as whole words; None where it does not.

    Forms that mean the same text are equal: composed and decomposed letters, all kinds of spaces and any number of
    them, of apostrophes, of quotes, of hyphens. Case counts. In scripts without letter case (Chinese, Thai, ...), which
    may put no space between words, an end of the subject need not be the end of a word.
    """
    wanted = _folded(subject.strip())[0]
    if not wanted:
        return None
    folded, places = _folded(text)
    start = folded.find(wanted)
    while start >= 0:
        end = start + len(wanted)
        before, after = folded[start - 1 : start] if start else "", folded[end : end + 1]
        if _is_boundary(before, wanted[0]) and _is_boundary(after, wanted[-1]) and not _is_mark(after):
            return places[start][0], places[end - 1][1]
        start = folded.find(wanted, start + 1)
    return None


def mentions(text: str, subject: str) -> bool:
    """Whether ``text`` names ``subject``; see `find_subject`."""
    return find_subject(text, subject) is not None


def nearest_span(text: str, subject: str) -> str:
    """The words of ``text`` that look most like ``subject``; empty where none does."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    count = max(1, len(subject.split()))
    best, found = 0.5, ""
    for size in {max(1, count - 1), count, count + 1}:
        for first, last in zip(words, words[size - 1 :], strict=False):
            span = text[first[0] : last[1]].strip(".,;:!?\"'()")
            likeness = difflib.SequenceMatcher(None, span.casefold(), subject.casefold()).ratio()
            if likeness > best:
                best, found = likeness, span
    return found


def _folded(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text with equal forms made the same, and for each of its characters where it comes from."""
    folded: list[str] = []
    places: list[tuple[int, int]] = []
    for place, char in enumerate(text):
        if char.isspace() and folded and folded[-1] == " ":
            places[-1] = (places[-1][0], place + 1)
            continue
        for part in " " if char.isspace() else unicodedata.normalize("NFD", _SAME.get(char, char)):
            folded.append(part)
            places.append((place, place + 1))
    return "".join(folded), places


def _is_boundary(outside: str, end: str) -> bool:
    """Whether a word ends between a subject's last (or first) character and the one outside."""
    if not outside or not (outside.isalnum() or outside == "_"):
        return True
    return unicodedata.category(end) == "Lo" or not (end.isalnum() or end == "_")


def _is_mark(char: str) -> bool:
    return bool(char) and unicodedata.combining(char) != 0
