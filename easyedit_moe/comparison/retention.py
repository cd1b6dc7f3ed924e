"""Scores on the way: of each edit right after its own batch, and of all edits so far after each batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from easyedit_moe.evaluation.metrics import EvaluationResult
from easyedit_moe.evaluation.paired import paired_test
from easyedit_moe.evaluation.summary import Score, shown

SCORES = ("efficacy", "generalisation", "specificity", "utility", "exact_match")
COLUMNS = ("method", "score", "right after its batch", "after all edits", "p")


@dataclass(frozen=True)
class Retention:
    """What a row keeps of them.

    Attributes:
        own: every record right after the batch that edits it; with a batch size of 1, right after its own edit.
        batches: after each batch, the number of edits so far and the scores of those records.
    """

    own: EvaluationResult
    batches: tuple[tuple[int, EvaluationResult], ...]

    def to_dict(self) -> dict[str, Any]:
        """For results.json; the values of single records only for ``own``."""
        own = {name: asdict(getattr(self.own, name)) for name in SCORES}
        return {"own": own, "batches": [{"edits": edits, **_brief(scores)} for edits, scores in self.batches]}

    @staticmethod
    def over_seeds(found: Sequence[Retention]) -> Retention:
        """The mean of several seeds' over the same batches."""
        sizes = [edits for edits, _ in found[0].batches]
        after = [_pooled([one.batches[i][1] for one in found]) for i in range(len(sizes))]
        return Retention(_pooled([one.own for one in found]), tuple(zip(sizes, after, strict=True)))


@dataclass
class RetentionWatch:
    """Collects a method's scores as its batches are made."""

    _own: dict[str, list[float | None]] = field(default_factory=lambda: {name: [] for name in SCORES})
    _batches: list[tuple[int, EvaluationResult]] = field(default_factory=list)

    def add(self, edits: int, scores: EvaluationResult) -> None:
        """Scores of the first ``edits`` records after a batch, the last of which it edited."""
        before = self._batches[-1][0] if self._batches else 0
        for name, values in self._own.items():
            values += getattr(scores, name).values[before:edits]
        self._batches.append((edits, scores))

    def found(self) -> Retention:
        """All of it; there was a batch."""
        own = {name: Score.of(values) for name, values in self._own.items()}
        return Retention(EvaluationResult(self._batches[-1][1].protocol, **own), tuple(self._batches))


def lines(method: str, retention: Retention, final: EvaluationResult) -> list[list[str]]:
    """Rows of the table of retention: each score right after the own batch and after all edits, compared in pairs."""
    out = []
    for name in SCORES:
        own, last = getattr(retention.own, name), getattr(final, name)
        test = paired_test(last.values, own.values) if own.count and len(own.values) == len(last.values) else None
        out.append([method, name, shown(own), shown(last), "-" if test is None else f"{test.p:.2g}"])
    return out


def _pooled(results: Sequence[EvaluationResult]) -> EvaluationResult:
    scores = {name: Score.over_seeds([getattr(one, name) for one in results]) for name in SCORES}
    return EvaluationResult(results[0].protocol, **scores)


def _brief(scores: EvaluationResult) -> dict[str, Any]:
    return {name: {**asdict(getattr(scores, name)), "values": []} for name in SCORES}
