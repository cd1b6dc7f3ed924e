"""BCD by colours is the sequential sweep in the same order, whatever is padded and whatever is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.syncs import counted_syncs
from easyedit_moe.algebra import bcd
from easyedit_moe.algebra.bcd import expert_orders, solve_bcd
from easyedit_moe.algebra.colours import colours
from easyedit_moe.algebra.metric import IdentityMetric, Metric, covariance_metric
from easyedit_moe.algebra.nullspace import null_space
from easyedit_moe.algebra.routed_keys import RoutedKeys
from easyedit_moe.algebra.systems import LARGEST, factor_ridge, factor_ridges, packed, size_classes, unpacked
from easyedit_moe.errors import HyperParamsError, NumericalError

# (T, E, K, d, h)
SHAPES = {
    "experts shared by tokens": (6, 5, 2, 3, 7),
    "T_j > h": (14, 3, 2, 4, 4),
    "one token": (1, 4, 3, 2, 5),
    "many experts, few tokens": (5, 24, 2, 6, 8),
    "one crowded expert among many": (9, 30, 2, 3, 5),
}


def problem(name: str, metric: str, seed: int) -> tuple[RoutedKeys, Tensor, Metric]:
    tokens, experts, width, d, h = SHAPES[name]
    draw = torch.Generator().manual_seed(seed)
    expert = torch.rand(tokens, experts, generator=draw).topk(width).indices
    if "crowded" in name:
        expert = torch.stack([torch.full((tokens,), 7), torch.arange(tokens) + 8], dim=1)
    gate = torch.rand(tokens, width, generator=draw, dtype=torch.float64) + 0.1
    key = torch.randn(tokens, width, h, generator=draw, dtype=torch.float64)
    residual = torch.randn(tokens, d, generator=draw, dtype=torch.float64)
    applied: Metric = IdentityMetric()
    if metric == "nullspace":
        rows = torch.randn(experts, 2, h, generator=draw, dtype=torch.float64)
        applied = null_space(rows.mT @ rows, torch.full((experts,), 9), 1e-6, False, 0, "keep")
    elif metric == "covariance":
        rows = torch.randn(experts, 2 * h, h, generator=draw, dtype=torch.float64)
        applied = covariance_metric(rows.mT @ rows, torch.full((experts,), 9), 1e-3, 0, "keep")
    return RoutedKeys(expert, gate, key), residual, applied


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("metric", ["identity", "nullspace", "covariance"])
@pytest.mark.parametrize("largest", [0, 1, 2, 32])
def test_by_colours_is_one_after_the_other(
    name: str, metric: str, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, residual, applied = problem(name, metric, seed=3)
    experts = SHAPES[name][1]
    orders = expert_orders(experts, 3, seed=1)
    monkeypatch.setattr(bcd, "LEAST_WIDTH", float("inf"))
    wanted, history = solve_bcd(keys, residual, 0.2, applied, orders)
    monkeypatch.setattr(bcd, "LEAST_WIDTH", 0.0)
    monkeypatch.setattr(bcd, "LARGEST", largest)
    found, report = solve_bcd(keys, residual, 0.2, applied, orders)
    torch.testing.assert_close(found.dense(experts), wanted.dense(experts), rtol=1e-10, atol=1e-12)
    assert report.objective == pytest.approx(history.objective, rel=1e-11)


def test_without_a_ridge_and_with_remembered_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, residual, applied = problem("many experts, few tokens", "identity", seed=5)
    residual[:2] = 0
    found = []
    for width in (float("inf"), 0.0):
        monkeypatch.setattr(bcd, "LEAST_WIDTH", width)
        found.append(solve_bcd(keys, residual, 0.0, applied, expert_orders(24, 2))[0].dense(24))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("seed", range(4))
def test_a_colour_shares_no_row_and_those_that_do_keep_their_order(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(20, generator=draw)[: 1 + seed + i % 3].tolist() for i in range(30)]
    rows[4] = []
    found = colours(rows)
    assert sorted(place for some in found for place in some) == list(range(30))
    colour = {place: number for number, some in enumerate(found) for place in some}
    for later in range(30):
        for earlier in range(later):
            if set(rows[earlier]) & set(rows[later]):
                assert colour[earlier] < colour[later]
    assert colours([]) == []


def test_a_pass_waits_for_the_device_no_more_than_it_has_to() -> None:
    """However many passes there are, their objectives are read at once."""
    keys, residual, applied = problem("many experts, few tokens", "identity", seed=2)
    counts = []
    for passes in (1, 5):
        with counted_syncs("cpu") as found:
            solve_bcd(keys, residual, 0.2, applied, expert_orders(24, passes))
        counts.append(sum(found.values()))
    assert counts[1] - counts[0] == 4  # the order itself, a list of the CPU's own


@pytest.mark.parametrize("lambda_reg", [0.0, 0.3])
def test_systems_factored_together_are_those_of_each(lambda_reg: float) -> None:
    draw = torch.Generator().manual_seed(0)
    sides = (3, 1, 65, 7, 33, 0, 7, 36, 35, 80, 32)
    roots = [torch.randn(90, n, generator=draw, dtype=torch.float64) for n in sides]
    grams = [root.T @ root for root in roots]
    with counted_syncs("cpu") as waits:
        found = factor_ridges(grams, lambda_reg)
    # The bounds, what became of all systems and, where no ridge says that they are regular, their inverses.
    assert sum(waits.values()) == (2 if lambda_reg else 3)
    for factor, gram in zip(found, grams, strict=True):
        torch.testing.assert_close(factor, factor_ridge(gram, lambda_reg), rtol=1e-12, atol=1e-14)
    assert factor_ridges([], lambda_reg) == []


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_a_singular_or_non_finite_one_among_others_is_told(scale: float) -> None:
    good = torch.eye(4, dtype=torch.float64) * scale
    root = torch.randn(2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * scale**0.5
    singular = root.T @ root
    for solve in (lambda grams: factor_ridges(grams, 0.0), lambda grams: [factor_ridge(g, 0.0) for g in grams]):
        with pytest.raises(NumericalError, match="3 x 3 system is singular"):
            solve([good, singular, good])
        with pytest.raises(NumericalError, match="NaN or infinity"):
            solve([good, good / 0])
    with pytest.raises(HyperParamsError):
        factor_ridges([good], -1.0)


def test_what_fills_up_a_size_class_is_bounded() -> None:
    sizes = [*range(2000)][::-1]
    found = size_classes(sizes)
    assert sorted(place for some in found for place in some) == list(range(2000))
    for some in found:
        own = [sizes[place] for place in some]
        assert max(own) <= LARGEST or max(own) ** 2 <= 1.27 * min(own) ** 2
    assert len(found) <= 1 + 8 * 6


def test_packed_tensors_come_back_as_they_were() -> None:
    tensors = [torch.arange(6.0).view(2, 3).mT, torch.zeros(0, 4), torch.tensor(7.0), torch.arange(4.0)]
    back = unpacked(packed(tensors), [tensor.shape for tensor in tensors])
    assert all(torch.equal(one, other) for one, other in zip(back, tensors, strict=True))
