from __future__ import annotations

from itertools import product

import pytest

from easyedit_moe.errors import DataError
from easyedit_moe.evaluation.paired import MCNEMAR, SIGN, PairedTest, binomial_p, holm, paired_test


@pytest.mark.parametrize(
    ("one", "other", "p"),
    [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 0.0625), (1, 9, 0.021484375), (8, 2, 0.109375), (0, 10, 0.001953125)],
)
def test_exact_p_values(one: int, other: int, p: float) -> None:
    assert binomial_p(one, other) == binomial_p(other, one) == p


def test_p_is_the_share_of_equally_likely_outcomes() -> None:
    for n in (3, 7):
        heads = [sum(flips) for flips in product((0, 1), repeat=n)]
        for k in range(n + 1):
            as_uneven = sum(abs(2 * h - n) >= abs(2 * k - n) for h in heads) / 2**n
            assert binomial_p(k, n - k) == pytest.approx(as_uneven)


def test_thousands_of_records_do_not_overflow() -> None:
    assert binomial_p(2000, 2000) == 1.0
    assert 0 < binomial_p(1500, 2500) < 1e-50
    with pytest.raises(DataError, match="negative"):
        binomial_p(-1, 3)


def test_the_test_follows_the_values() -> None:
    found = paired_test([1.0, 1.0, 0.0, None, 1.0], [0.0, 1.0, 1.0, 1.0, None])
    assert found == PairedTest(MCNEMAR, 1, 1, 1.0)
    shares = paired_test([0.5, 0.6, 0.7, 0.8, 0.9, 1.0], [0.4, 0.5, 0.6, 0.7, 0.8, 1.0])
    assert shares == PairedTest(SIGN, 5, 0, 0.0625)
    assert paired_test([None, 1.0], [1.0, None]) is None
    with pytest.raises(DataError, match="same records"):
        paired_test([1.0], [1.0, 0.0])


def test_holm() -> None:
    assert holm([]) == []
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
