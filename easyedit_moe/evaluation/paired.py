"""Exact paired tests between two methods on the same records, and a correction for many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

from easyedit_moe.errors import DataError

MCNEMAR = "McNemar, exact"
SIGN = "sign test, exact"
LEVEL = 0.05
"""Below which a difference counts."""


@dataclass(frozen=True)
class PairedTest:
    """How the values of two methods differ, record by record.

    Attributes:
        test: `MCNEMAR` where all values are 0 or 1, else `SIGN`.
        better, worse: records at which the first has the greater and the smaller value; ties do not count.
        p: two-sided, that of so uneven a split where both are equally likely.
    """

    test: str
    better: int
    worse: int
    p: float


def binomial_p(one: int, other: int) -> float:
    """Two-sided exact p of a split of ``one + other`` fair coins at least as uneven as this; 1 without any.

    Raises:
        DataError: a negative count.
    """
    if one < 0 or other < 0:
        raise DataError(f"Counts can't be negative; found {one} and {other}.")
    n = one + other
    tail = sum(comb(n, k) for k in range(min(one, other) + 1))
    return min(1.0, 2 * tail / 2**n)


def paired_test(first: Sequence[float | None], second: Sequence[float | None]) -> PairedTest | None:
    """McNemar's test (1947), exact, of values that are 0 or 1, else the sign test; None without a common record.

    Args:
        first: one value per record; None where a record has none.
        second: the other method's, of the same records in the same order.

    Raises:
        DataError: different numbers of records.
    """
    if len(first) != len(second):
        raise DataError(f"A paired test needs the same records; found {len(first)} and {len(second)}.")
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    better, worse = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    binary = {value for pair in pairs for value in pair} <= {0.0, 1.0}
    return PairedTest(MCNEMAR if binary else SIGN, better, worse, binomial_p(better, worse))


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979), in their order: those below a level hold together at it."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    out, highest = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[i]))
        out[i] = highest
    return out
