"""Runs of layers, their order and their names."""

from __future__ import annotations

from itertools import pairwise

import pytest

from easyedit_moe.errors import LayerError
from easyedit_moe.evaluation.means import Mean
from easyedit_moe.localisation.windows import by_promise, candidate_windows, window_name


def test_all_runs() -> None:
    assert candidate_windows([0, 1, 2], [2]) == [(0, 1), (1, 2)]
    assert candidate_windows([1, 3, 5], [1, 3, 1]) == [(1,), (3,), (5,), (1, 3, 5)]


@pytest.mark.parametrize("most", [1, 2, 3, 7, 24, 100])
def test_no_more_than_asked_for_and_evenly_spread(most: int) -> None:
    every = candidate_windows(range(48), [1, 2, 5])
    some = candidate_windows(range(48), [1, 2, 5], most)
    assert len(every) == 48 + 47 + 44
    assert len(some) == len(set(some)) == most
    assert set(some) <= set(every)
    assert some[0] == every[0]
    if most > 1:
        assert some[-1] == every[-1]
        places = [every.index(window) for window in some]
        gaps = [b - a for a, b in pairwise(places)]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(("widths", "most"), [([], None), ([0], None), ([4], None), ([1], 0)])
def test_refused(widths: list[int], most: int | None) -> None:
    with pytest.raises(LayerError, match="1 to 3 layers"):
        candidate_windows([0, 1, 2], widths, most)


def test_the_last_layer_says_what_a_window_promises() -> None:
    windows = [(0, 1), (1, 2), (2, 3), (3, 4), (2,)]
    assert by_promise(windows, {1: 3.0, 2: 0.5, 3: 1.0}) == [(1, 2), (2,), (2, 3), (0, 1), (3, 4)]


def test_names() -> None:
    assert [window_name(w) for w in ((3,), (3, 4, 5), (1, 3, 5))] == ["3", "3-5", "1,3,5"]


def test_mean() -> None:
    found = Mean.of([1.0, 2.0, 6.0])
    assert (found.mean, found.stderr, found.count) == (3.0, pytest.approx((7 / 3) ** 0.5), 3)
    assert Mean.of([]).count == 0
    assert Mean.of([2.0]).stderr == 0
