"""A mean over facts, with its standard error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan, sqrt


@dataclass(frozen=True)
class Mean:
    """Mean of ``count`` values and its standard error, in the values' own unit; NaN without any."""

    mean: float
    stderr: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Mean:
        """Of some values."""
        n = len(values)
        if n == 0:
            return Mean(nan, nan, 0)
        mean = sum(values) / n
        variance = sum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else 0.0
        return Mean(mean, sqrt(variance / n), n)


def mean_of(values: Sequence[float]) -> float | None:
    """The plain mean; None of no values."""
    return sum(values) / len(values) if values else None
