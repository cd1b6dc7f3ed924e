from __future__ import annotations

from math import comb, nan

import numpy as np
import pytest

from easyedit_moe.errors import DataError
from easyedit_moe.evaluation.intervals import BOOTSTRAP, OVER_SEEDS, WILSON, bootstrap, interval_of, wilson
from easyedit_moe.evaluation.summary import Score, Summary, legend, shown


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        # Newcombe (1998), table I: Wilson's score without continuity correction.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_published_values(successes: int, count: int, low: float, high: float) -> None:
    found = wilson(successes / count, count)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson(1 - successes / count, count)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((low, high), abs=5e-5)


def test_wilson_solves_its_equation() -> None:
    """Each end is the p at which the observed share lies 1.96 standard deviations off."""
    z = 1.959963984540054
    for share, count in ((0.3, 10), (0.97, 100), (1.0, 50)):
        found = wilson(share, count)
        for end in (found.low, found.high):
            if 0 < end < 1:
                assert abs(share - end) == pytest.approx(z * (end * (1 - end) / count) ** 0.5)


@pytest.mark.parametrize(("share", "count"), [(0.5, 0), (1.1, 4), (-0.1, 4), (nan, 4)])
def test_wilson_refuses_what_is_no_proportion(share: float, count: int) -> None:
    with pytest.raises(DataError, match="A proportion in"):
        wilson(share, count)


def test_bootstrap_is_that_of_the_mean() -> None:
    values = np.random.default_rng(3).random(400)
    found, again = bootstrap([values.tolist()]), bootstrap([values.tolist()])
    assert found == again, "seeded"
    half = 1.96 * values.std() / 20  # of a mean of 400 values, nearly normal
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert bootstrap([values.tolist()], seed=1) != found
    assert found.kind == BOOTSTRAP


def test_bootstrap_over_seeds_counts_both_sources() -> None:
    """Two seeds that agree within, but not with each other: the interval must span both."""
    flat = bootstrap([[0.2] * 50, [0.8] * 50])
    assert (flat.low, flat.high, flat.kind) == (pytest.approx(0.2), pytest.approx(0.8), OVER_SEEDS)
    draw = np.random.default_rng(0)
    table = draw.random((8, 300)) * 0.2 + np.linspace(0.2, 0.6, 8)[:, None]
    between = table.mean(1).std() / 8**0.5
    found = bootstrap(table.tolist())
    assert found.high - found.low == pytest.approx(2 * 1.96 * between, rel=0.1)
    alone = bootstrap([table.mean(0).tolist()])
    assert alone.high - alone.low < 0.2 * (found.high - found.low)


@pytest.mark.parametrize("table", [[], [[]], [[0.1], [0.1, 0.2]]])
def test_bootstrap_refuses_ragged_and_empty_tables(table: list[list[float]]) -> None:
    with pytest.raises(DataError, match="rows of equal length"):
        bootstrap(table)


def test_the_kind_follows_the_values() -> None:
    assert interval_of([]) is None
    assert interval_of([1.0] * 30) == wilson(1.0, 30)
    assert interval_of([1.0, 0.0, 1.0]) == wilson(2 / 3, 3)
    assert interval_of([0.5] * 30) == wilson(0.5, 30), "no width without a spread of values"
    assert interval_of([0.5, 1.0, 0.25]) == bootstrap([[0.5, 1.0, 0.25]])


def test_a_score_of_all_right_has_an_interval() -> None:
    score = Score.of([1.0] * 50 + [None])
    assert (score.mean, score.count, score.interval) == (100, 50, WILSON)
    assert score.low == pytest.approx(92.87, abs=0.01)
    assert score.high == 100
    assert score.values == (1.0,) * 50 + (None,)
    assert shown(score) == "100.0 [92.9, 100.0] w"
    assert shown(Score.of([])) == "-"
    assert shown(Summary(0.5, None, 3), 4) == "0.5000"
    assert shown(Summary(50.0, 1.0, 3)) == "50.0 ± 1.0", "a file of schema 1"


def test_scores_over_seeds() -> None:
    one, two = Score.of([1.0, 0.0, None, 1.0]), Score.of([1.0, 1.0, None, 1.0])
    found = Score.over_seeds([one, two])
    assert found.mean == pytest.approx((one.mean + two.mean) / 2)
    assert (found.count, found.values, found.interval) == (3, (1.0, 0.5, None, 1.0), OVER_SEEDS)
    assert found.low < found.mean < found.high
    same = Score.over_seeds([Score.of([1.0] * 9)] * 2)
    assert (same.low, same.interval) == (100 * wilson(1.0, 9).low, WILSON)
    assert Score.over_seeds([Score.of([None])] * 2).count == 0
    assert legend([found, one]).startswith("Mean [95 % interval]. w: Wilson score interval")
    assert "s: percentile bootstrap" in legend([found])
    assert legend([Summary(1.0, 1.0, 1)]) == ""


def test_wilson_covers_at_its_level() -> None:
    """Exact coverage, summed over all outcomes, is close to 95 % on average over proportions."""
    n, shares = 30, np.linspace(0.05, 0.95, 19)
    ends = [wilson(k / n, n) for k in range(n + 1)]
    covered = [
        sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k, e in enumerate(ends) if e.low <= p <= e.high) for p in shares
    ]
    assert 0.94 < np.mean(covered) < 0.965
    assert min(covered) > 0.9
