"""Knowledge anchors: which subject of an edited fact the tokens of a text belong to.

A token's anchor is the subject that ended last at or before it, so it depends on nothing that comes after the token,
but for one thing: the subject must be a whole word of the text that is known when the token is processed ("Ana" is not
found in "Anabel").
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from easyedit_moe.facts.tokens import decode

NO_ANCHOR = -1


@dataclass(frozen=True)
class Occurrence:
    """A subject, by its index, at the characters ``start`` to ``end`` (exclusive) of a text."""

    start: int
    end: int
    subject: int


class SubjectMatcher:
    """Finds subjects in texts and in token sequences; a value that is shared by copies, never changed."""

    def __init__(self, tok: PreTrainedTokenizerBase, subjects: Sequence[str]) -> None:
        self.tok = tok
        self.subjects = tuple(subjects)
        self._flat = [_flat(subject) for subject in self.subjects]
        self._exact = [re.compile(_bounded(re.escape(s), s)) for s in self.subjects]
        loose = [r"\s+".join(re.escape(word) for word in s.split()) for s in self.subjects]
        self._loose = [
            re.compile(_bounded(p, s.strip()), re.IGNORECASE) for p, s in zip(loose, self.subjects, strict=True)
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> SubjectMatcher:
        return self

    def find(self, text: str) -> list[Occurrence]:
        """Occurrences as whole words, by their ends; case and white space may differ.

        Of two that overlap the longer one counts, and of two of the same length the one that is exact.
        """
        flat = _flat(text)
        candidates = [i for i, subject in enumerate(self._flat) if subject in flat]
        matches = [
            (match.start() - match.end(), level, Occurrence(*match.span(), i))
            for level, patterns in enumerate((self._exact, self._loose))
            for i in candidates
            for match in patterns[i].finditer(text)
        ]
        found: list[Occurrence] = []
        for _, _, one in sorted(matches, key=lambda m: m[:2]):
            if all(one.end <= other.start or one.start >= other.end for other in found):
                found.append(one)
        return sorted(found, key=lambda o: o.end)

    def anchors(self, ids: Sequence[int]) -> list[int]:
        """Index of each token's anchor, ``NO_ANCHOR`` before the first subject ends. Special tokens are skipped."""
        text = self._decode(ids)
        out = [NO_ANCHOR] * len(ids)
        for one in self.find(text):
            first = self._token_at(ids, text[: one.end])
            out[first:] = [one.subject] * (len(ids) - first)
        return out

    def _token_at(self, ids: Sequence[int], prefix: str) -> int:
        """Index of the token that completes ``prefix``: by bisection, since decoded prefixes only grow."""
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            if self._decode(ids[:middle]).startswith(prefix):
                high = middle
            else:
                low = middle + 1
        return low - 1

    def _decode(self, ids: Sequence[int]) -> str:
        return decode(self.tok, ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _flat(text: str) -> str:
    return " ".join(text.lower().split())


def _bounded(pattern: str, subject: str) -> str:
    """``pattern`` as a whole word; an end in a script without letter case, which may have no spaces, is no boundary."""
    before = "" if unicodedata.category(subject[0]) == "Lo" else r"(?<!\w)"
    after = "" if unicodedata.category(subject[-1]) == "Lo" else r"(?!\w)"
    return f"{before}{pattern}{after}"
