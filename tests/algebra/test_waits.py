"""The CPU waits for a device as often for 48 experts as for 8, whatever a system's form and however full experts are.

There are 16 tokens per expert, each routed to four, so that both grow together and systems have more than 32 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from reference import planted_projectors, random_covariances, routed
from torch import Tensor

from benchmarks.syncs import counted_syncs
from easyedit_moe.algebra import bcd, core, exact, held_bcd, systems
from easyedit_moe.algebra.bcd import expert_orders, solve_bcd
from easyedit_moe.algebra.coordinates import CoreCoordinates, ExpertCoordinates
from easyedit_moe.algebra.core import core_energy, solve_mote, solve_mote_held
from easyedit_moe.algebra.core_update import TuckerFactors, place_core
from easyedit_moe.algebra.cumulative import less, output_change
from easyedit_moe.algebra.exact import solve_exact, solve_exact_held
from easyedit_moe.algebra.held import HeldMoment, HeldSystem
from easyedit_moe.algebra.held_bcd import solve_bcd_held
from easyedit_moe.algebra.hypersphere import projected
from easyedit_moe.algebra.metric import IdentityMetric, Metric, covariance_metric, mean_energy, objective
from easyedit_moe.algebra.norm_anchor import anchored
from easyedit_moe.algebra.nullspace import null_space
from easyedit_moe.algebra.preservation import preservation_loss
from easyedit_moe.algebra.routed_keys import FactoredUpdate, RoutedKeys
from easyedit_moe.algebra.sequence_norm import Running, sequence_normalised
from easyedit_moe.algebra.tucker import TuckerBasis, tucker_basis

EXPERTS = (8, 24, 48)
D = 6
FEW, MANY = 10, 100
"""Widths h below and above the tokens of any expert."""


@dataclass(frozen=True)
class Case:
    keys: RoutedKeys
    residual: Tensor
    metric: Metric
    experts: int
    weights: Tensor
    draw: torch.Generator

    @property
    def h(self) -> int:
        return self.keys.d_hidden

    def coordinates(self) -> ExpertCoordinates:
        return ExpertCoordinates(self.metric, self.experts, self.h, torch.device("cpu"))

    def basis(self, whole: bool) -> TuckerBasis:
        return tucker_basis(self.weights, 1.0 if whole else 4, D, 5)

    def held(self, count: int) -> dict[int, RoutedKeys]:
        return {0: routed(count, self.experts, 2, self.h, self.draw, torch.float64)}


def case(experts: int, h: int, metric: str = "identity") -> Case:
    draw = torch.Generator().manual_seed(0)
    keys = routed(16 * experts, experts, 4, h, draw, torch.float64)
    residual = torch.randn(16 * experts, D, generator=draw, dtype=torch.float64)
    weights = torch.randn(experts, D, h, generator=draw, dtype=torch.float64)
    applied: Metric = IdentityMetric()
    if metric == "nullspace":
        applied, _ = planted_projectors(experts, h, draw)
    elif metric == "covariance":
        applied, _ = random_covariances(experts, h, draw)
    return Case(keys, residual, applied, experts, weights, draw)


def same_waits(count: Callable[[int], int], limit: int) -> None:
    counts = [count(experts) for experts in EXPERTS]
    assert counts[0] == counts[1] == counts[2] <= limit, counts


def waits(work: Callable[[], object]) -> int:
    with counted_syncs("cpu") as found:
        work()
    return found.total()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done in chunks is done in several, and in more of them where there are more experts or tokens."""
    for module in (systems, exact, core, held_bcd):
        monkeypatch.setattr(module, "CHUNK", 4 * 100**2)


@pytest.mark.parametrize("metric", ["identity", "nullspace", "covariance"])
@pytest.mark.parametrize("form", ["dual", "primal"])
def test_of_the_exact_solver(form: str, metric: str) -> None:
    def count(experts: int) -> int:
        c = case(experts, FEW, metric)
        return waits(lambda: solve_exact(c.keys, c.residual, 0.1, c.metric, form))

    same_waits(count, 12)


@pytest.mark.parametrize("lambda_reg", [0.0, 1e-12, 0.1])
@pytest.mark.parametrize("small_pass", [0.0, 2e9], ids=["large", "small"])
@pytest.mark.parametrize("h", [FEW, MANY])
@pytest.mark.parametrize("metric", ["identity", "nullspace", "covariance"])
def test_of_bcd(h: int, metric: str, lambda_reg: float, small_pass: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By either form of an expert's system, by projectors that leave all or nothing, and with any ridge."""
    monkeypatch.setattr(bcd, "SMALL_PASS", small_pass)
    if lambda_reg < 0.1 and (h == FEW or metric == "nullspace"):
        pytest.skip("these systems are singular with next to no ridge")

    def count(experts: int) -> int:
        c = case(experts, h, metric)
        assert (torch.bincount(c.keys.expert.flatten()) > 32).all()
        return waits(lambda: solve_bcd(c.keys, c.residual, lambda_reg, c.metric, expert_orders(experts, 3)))

    same_waits(count, 20)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("form", ["dual", "primal"])
def test_of_mote(form: str, whole: bool) -> None:
    def count(experts: int) -> int:
        c = case(experts, FEW)
        basis = c.basis(whole)
        factors = TuckerFactors.of(basis, c.metric, torch.float64)
        return waits(lambda: place_core(solve_mote(c.keys, c.residual, 0.1, c.metric, basis, form), factors))

    same_waits(count, 16)


@pytest.mark.parametrize("rows", [6, 600])
@pytest.mark.parametrize("method", ["exact", "mote", "bcd"])
def test_of_held_rows(method: str, rows: int) -> None:
    """Few of them by their kernel, many by their second moment."""

    def count(experts: int) -> int:
        c = case(experts, FEW)
        held = c.held(rows)
        if method == "mote":
            coordinates = CoreCoordinates(c.basis(False), c.metric)
            system = HeldSystem(coordinates, 0.1)
            return waits(lambda: (system.hold(held), solve_mote_held(c.keys, c.residual, system, coordinates)))
        own = c.coordinates()
        if method == "exact":
            exact_system = HeldSystem(own, 0.1)
            return waits(lambda: (exact_system.hold(held), solve_exact_held(c.keys, c.residual, exact_system, own)))
        moment, orders = HeldMoment(own), expert_orders(experts, 2)
        return waits(lambda: (moment.hold(held), solve_bcd_held(c.keys, c.residual, 0.1, moment, own, orders)))

    same_waits(count, 36)


def test_of_the_unit_of_a_relative_ridge() -> None:
    def count(experts: int, core: bool) -> int:
        c = case(experts, FEW)
        basis = c.basis(False)
        return waits(lambda: core_energy(c.keys, basis, c.metric) if core else mean_energy(c.keys, c.metric))

    same_waits(partial(count, core=False), 6)
    same_waits(partial(count, core=True), 6)


def _update(c: Case) -> FactoredUpdate:
    return solve_exact(c.keys, c.residual, 0.1, c.metric)


def _anchored(c: Case) -> object:
    return anchored(_update(c), dict(enumerate(c.weights)), torch.ones(c.experts), 1.01)


def _preserved(c: Case) -> object:
    return preservation_loss(c.weights, c.weights.mT @ c.weights, torch.arange(c.experts))


def _projected(c: Case) -> object:
    return projected(_update(c), [weight.T[:, :2] for weight in c.weights], 1.0)


def _cumulative(c: Case) -> object:
    return output_change(c.weights, c.keys), less(_update(c), c.weights)


def _normalised(c: Case) -> object:
    return sequence_normalised(c.keys, c.residual, Running.empty(c.experts, c.h), Running.empty(1, D), 1.0)


def _objective(c: Case) -> object:
    return objective(c.keys, c.residual, 0.1, c.metric, _update(c))


@pytest.mark.parametrize("option", [_anchored, _preserved, _projected, _cumulative, _normalised, _objective])
def test_of_options_for_long_runs(option: Callable[[Case], object]) -> None:
    same_waits(lambda experts: waits(partial(option, case(experts, FEW))), 20)


@pytest.mark.parametrize("ridge", [1e-3, 0.0])
def test_of_metrics_that_are_made_anew(ridge: float) -> None:
    def moments(experts: int) -> tuple[Tensor, Tensor]:
        keys = torch.randn(experts, 30, FEW, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return keys.mT @ keys / 30, torch.full((experts,), 30)

    same_waits(lambda experts: waits(lambda: covariance_metric(*moments(experts), ridge)), 8)
    same_waits(lambda experts: waits(lambda: null_space(*moments(experts), None, energy=0.5)), 8)
