"""Knowledge anchors: which subject of an edited fact the tokens of a text belong to.

A token's anchor is the subject that ended last at or before it, so it depends on nothing that comes after the token,
but for one thing: the subject must be a whole word of the text that is known when the token is processed ("Ana" is not
found in "Anabel").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from easyedit_moe.facts.subjects import Folded, find_all
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
        self._wanted = [Folded.of(subject.strip(), ignore_case=True).folded for subject in self.subjects]
        self._cased = [Folded.of(subject.strip()).folded for subject in self.subjects]
        added = getattr(tok, "added_tokens_decoder", {})
        self._special = frozenset(tok.all_special_ids) | {i for i, token in added.items() if token.special}

    def __deepcopy__(self, memo: dict[int, Any]) -> SubjectMatcher:
        return self

    def find(self, text: str) -> list[Occurrence]:
        """Occurrences as whole words (see `easyedit_moe.facts.subjects.find_subject`), by their ends; case may differ.

        Of two that overlap the longer one counts, and of two of the same length the one that is exact.
        """
        folded = Folded.of(text, ignore_case=True)
        matches = [
            (start - end, self._difference(text[start:end], i), Occurrence(start, end, i))
            for i, wanted in enumerate(self._wanted)
            if wanted in folded.folded
            for start, end in find_all(folded, wanted)
        ]
        found: list[Occurrence] = []
        for _, _, one in sorted(matches, key=lambda m: m[:2]):
            if all(one.end <= other.start or one.start >= other.end for other in found):
                found.append(one)
        return sorted(found, key=lambda o: o.end)

    def anchors(self, ids: Sequence[int]) -> list[int]:
        """Index of each token's anchor, ``NO_ANCHOR`` before the first subject ends.

        Special tokens are skipped; a text ends and another begins there.
        """
        out = [NO_ANCHOR] * len(ids)
        for start, run in self._runs(ids):
            for one, last in self._ends(run):
                out[start + last :] = [one] * (len(ids) - start - last)
        return out

    def _difference(self, found: str, subject: int) -> int:
        """How far a text is from the subject as it was given: exact, an equivalent form, another case."""
        if found == self.subjects[subject]:
            return 0
        return 1 if Folded.of(found).folded == self._cased[subject] else 2

    def _runs(self, ids: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
        """Where the stretches without special tokens begin, and their ids."""
        start = 0
        for place in [*(i for i, one in enumerate(ids) if int(one) in self._special), len(ids)]:
            if place > start:
                yield start, ids[start:place]
            start = place + 1

    def _ends(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """The subjects in a stretch of ids, and the token that completes each."""
        text = self._decode(ids)
        return [(one.subject, self._token_at(ids, text[: one.end])) for one in self.find(text)]

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
        return decode(self.tok, ids, clean_up_tokenization_spaces=False)
