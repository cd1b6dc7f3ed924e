"""A score over records: its mean, its interval, and the values that paired tests need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from easyedit_moe.evaluation.intervals import (
    BOOTSTRAP,
    KINDS,
    LEVEL,
    OVER_SEEDS,
    WILSON,
    Interval,
    bootstrap,
    interval_of,
    wilson,
)
from easyedit_moe.evaluation.means import Mean

MARKS = {WILSON: "w", BOOTSTRAP: "b", OVER_SEEDS: "s"}
"""The letter that stands behind each kind of interval in a table."""


@dataclass(frozen=True)
class Summary:
    """A mean over ``count`` records or examples (NaN without any).

    Attributes:
        mean: over records, and over seeds where there are several.
        stderr: standard error over records; None where there is none.
        count: of records that have a value.
        low, high: ends of the 95 % interval; None without a record, and where none was computed.
        interval: its kind, one of `easyedit_moe.evaluation.intervals.KINDS`; empty without one.
    """

    mean: float
    stderr: float | None
    count: int
    low: float | None = None
    high: float | None = None
    interval: str = ""


@dataclass(frozen=True)
class Score(Summary):
    """A mean over records in percent; files of schema 1 have neither interval nor values.

    Attributes:
        values: in [0, 1], one per record in their order (means over seeds), None where a record has none.
    """

    stderr: float
    values: tuple[float | None, ...] = ()

    @staticmethod
    def of(values: Sequence[float | None]) -> Score:
        """From values in [0, 1], one per record, None where a record has none."""
        known = [value for value in values if value is not None]
        return _score(values, interval_of(known))

    @staticmethod
    def over_seeds(scores: Sequence[Score]) -> Score:
        """The same score of the same records by several seeds, as their mean.

        The interval is over records and seeds. Where it has no width (all values are one), it is Wilson's for as many
        records as there are.
        """
        table = [[value for value in score.values if value is not None] for score in scores]
        values = [_mean(column) for column in zip(*(score.values for score in scores), strict=True)]
        if not table[0]:
            return _score(values, None)
        found = bootstrap(table)
        if found.low == found.high:
            found = wilson(found.low, len(table[0]))
        return _score(values, found)


def _mean(column: Sequence[float | None]) -> float | None:
    known = [value for value in column if value is not None]
    return sum(known) / len(known) if known else None


def _score(values: Sequence[float | None], interval: Interval | None) -> Score:
    mean = Mean.of([value for value in values if value is not None])
    percent = (100 * mean.mean, 100 * mean.stderr, mean.count)
    if interval is None:
        return Score(*percent, values=tuple(values))
    return Score(*percent, 100 * interval.low, 100 * interval.high, interval.kind, tuple(values))


def shown(score: Summary, digits: int = 1) -> str:
    """Mean and interval as text, such as "97.0 [91.5, 99.0] w"; the letter is the first of the kind's name, or "s"."""
    if not score.count:
        return "-"
    mean = f"{score.mean:.{digits}f}"
    if score.low is None or score.high is None:
        return mean if score.stderr is None else f"{mean} ± {score.stderr:.{digits}f}"
    return f"{mean} [{score.low:.{digits}f}, {score.high:.{digits}f}] {MARKS[score.interval]}"


def legend(scores: Sequence[Summary]) -> str:
    """What the letters behind the intervals mean; empty without an interval."""
    kinds = [kind for kind in KINDS if any(score.interval == kind for score in scores)]
    listed = "; ".join(f"{MARKS[kind]}: {KINDS[kind]}" for kind in kinds)
    return f"Mean [{100 * LEVEL:.0f} % interval]. {listed}." if listed else ""
