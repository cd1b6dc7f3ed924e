"""Confidence intervals: Wilson's for proportions, a seeded percentile bootstrap for means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np

from easyedit_moe.errors import DataError

LEVEL = 0.95
RESAMPLES = 2000
SEED = 0
_AT_ONCE = 2_000_000  # drawn values that are held at a time

WILSON = "wilson"
BOOTSTRAP = "bootstrap"
OVER_SEEDS = "bootstrap over records and seeds"
KINDS = {
    WILSON: "Wilson score interval of a proportion",
    BOOTSTRAP: f"percentile bootstrap of a mean, {RESAMPLES} resamples of the records, seed {SEED}",
    OVER_SEEDS: f"percentile bootstrap of a mean, {RESAMPLES} resamples of records and, independently, of seeds, "
    f"seed {SEED}",
}
"""What each kind of interval is, in words; all at `LEVEL`."""


@dataclass(frozen=True)
class Interval:
    """Both ends, in the unit of the values, and which kind it is: one of `KINDS`."""

    low: float
    high: float
    kind: str


def wilson(share: float, count: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval (1927) of a proportion ``share`` of ``count`` trials.

    It has width where all trials agree, and for values between 0 and 1 with this mean, whose variance is at most that
    of a proportion, it is conservative.

    Raises:
        DataError: no trial, or a share outside [0, 1].
    """
    if count < 1 or not 0 <= share <= 1:
        raise DataError(f"A proportion in [0, 1] of at least one trial is needed; found {share} of {count}.")
    z = NormalDist().inv_cdf((1 + level) / 2)
    scale = 1 + z * z / count
    centre = (share + z * z / (2 * count)) / scale
    half = z * sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    return Interval(max(0.0, centre - half), min(1.0, centre + half), WILSON)


def bootstrap(table: Sequence[Sequence[float]], level: float = LEVEL, seed: int = SEED) -> Interval:
    """Percentile bootstrap (Efron 1979) of the mean of ``table``, a row of values per seed (often just one).

    Records (columns) are drawn with replacement, and so, independently, are seeds where there are several: an interval
    for other records and other seeds. With few seeds it is too narrow, as every bootstrap of few values is.

    Raises:
        DataError: no values, or rows of different lengths.
    """
    lengths = {len(row) for row in table}
    if len(lengths) != 1 or lengths == {0}:
        raise DataError(f"A bootstrap needs rows of equal length with values; found lengths {sorted(lengths)}.")
    values = np.asarray(table, dtype=np.float64)
    rows, columns = values.shape
    draw = np.random.default_rng(seed)
    means: list[np.ndarray] = []
    step = max(1, _AT_ONCE // columns)
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        weights = draw.multinomial(rows, np.full(rows, 1 / rows), size) / rows
        picked = draw.integers(columns, size=(size, columns))
        means.append(sum(weights[:, [i]] * values[i][picked] for i in range(rows)).mean(1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), BOOTSTRAP if rows == 1 else OVER_SEEDS)


def interval_of(values: Sequence[float]) -> Interval | None:
    """Wilson's where all values are 0 or 1 or all are the same, else a bootstrap; None without any.

    Args:
        values: one per record, in [0, 1].
    """
    if not values:
        return None
    if set(values) <= {0.0, 1.0} or len(set(values)) == 1:
        return wilson(sum(values) / len(values), len(values))
    return bootstrap([values])
