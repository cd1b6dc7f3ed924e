"""Earlier edits held by a reduced system against the growing one, with every row as a column."""

from __future__ import annotations

import pytest
import torch
from reference import RIDGE, planted_projectors, random_covariances, routed
from torch import Tensor

from benchmarks.syncs import counted_syncs
from easyedit_moe.algebra import held as held_module
from easyedit_moe.algebra import held_bcd
from easyedit_moe.algebra.bcd import expert_orders, solve_bcd
from easyedit_moe.algebra.coordinates import CoreCoordinates, ExpertCoordinates
from easyedit_moe.algebra.core import solve_mote, solve_mote_held
from easyedit_moe.algebra.core_update import expand_core
from easyedit_moe.algebra.exact import solve_exact, solve_exact_held
from easyedit_moe.algebra.held import Held, HeldMoment, HeldSystem
from easyedit_moe.algebra.held_bcd import solve_bcd_held
from easyedit_moe.algebra.metric import IdentityMetric, Metric
from easyedit_moe.algebra.routed_keys import FactoredUpdate, RoutedKeys
from easyedit_moe.algebra.tucker import TuckerBasis, tucker_basis

E, K, D, H, LAMBDA = 4, 2, 6, 5, 0.3
SOLVERS = ["exact", "bcd", "mote", "mote, expert rank below E"]
METRICS = ["identity", "nullspace", "covariance"]


def metric_of(kind: str, g: torch.Generator) -> Metric:
    if kind == "identity":
        return IdentityMetric()
    return (planted_projectors if kind == "nullspace" else random_covariances)(E, H, g)[0]


class Case:
    """One solver with and without held rows."""

    def __init__(self, solver: str, metric: str, lambda_reg: float = LAMBDA) -> None:
        g = torch.Generator().manual_seed(3)
        self.solver, self.metric, self.lambda_reg = solver, metric_of(metric, g), lambda_reg
        self.expert = ExpertCoordinates(self.metric, E, H, torch.device("cpu"))
        self.orders = expert_orders(E, 3)
        ranks = (E if solver == "mote" else 3, D - 1, H - 1)
        self.basis: TuckerBasis = tucker_basis(torch.randn(E, D, H, generator=g, dtype=torch.float64), *ranks)

    def held(self) -> Held:
        if self.solver == "bcd":
            return HeldMoment(self.expert)
        if self.solver == "exact":
            return HeldSystem(self.expert, self.lambda_reg)
        return HeldSystem(CoreCoordinates(self.basis, self.metric), self.lambda_reg)

    def reduced(self, held: Held, keys: RoutedKeys, residual: Tensor) -> tuple[FactoredUpdate, Tensor]:
        if isinstance(held, HeldMoment):
            update, report = solve_bcd_held(keys, residual, self.lambda_reg, held, self.expert, self.orders)
            return update, torch.tensor(report.objective, dtype=torch.float64)
        assert isinstance(held, HeldSystem)
        none = torch.zeros(0, dtype=torch.float64)
        if self.solver == "exact":
            return solve_exact_held(keys, residual, held, self.expert), none
        core = solve_mote_held(keys, residual, held, CoreCoordinates(self.basis, self.metric))
        return expand_core(core, self.basis, self.metric), none

    def growing(self, rows: list[RoutedKeys], keys: RoutedKeys, residual: Tensor) -> tuple[FactoredUpdate, Tensor]:
        everything = RoutedKeys.cat([*rows, keys])
        wanted = residual.new_zeros(everything.num_tokens, D)
        wanted[-keys.num_tokens :] = residual
        if self.solver == "bcd":
            update, report = solve_bcd(everything, wanted, self.lambda_reg, self.metric, self.orders)
            return update, torch.tensor(report.objective, dtype=torch.float64)
        none = torch.zeros(0, dtype=torch.float64)
        if self.solver == "exact":
            return solve_exact(everything, wanted, self.lambda_reg, self.metric), none
        core = solve_mote(everything, wanted, self.lambda_reg, self.metric, self.basis)
        return expand_core(core, self.basis, self.metric), none

    def check(self, held: Held, rows: list[RoutedKeys], keys: RoutedKeys, residual: Tensor) -> FactoredUpdate:
        (found, objectives), (wanted, history) = self.reduced(held, keys, residual), self.growing(rows, keys, residual)
        dense = wanted.dense(E)
        if self.solver == "bcd":  # rows of zero residual add nothing to the rank
            assert all(len(columns) <= keys.num_tokens for columns in wanted.columns)
        torch.testing.assert_close(found.dense(E), dense, rtol=1e-6, atol=1e-6 * float(dense.abs().max()))
        torch.testing.assert_close(objectives, history, rtol=1e-9, atol=1e-9)
        return found


def batches(count: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[RoutedKeys]:
    g = torch.Generator().manual_seed(seed)
    return [routed(size, E, K, H, g, dtype) for _ in range(count)]


def residual_of(size: int) -> Tensor:
    return torch.randn(size, D, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_solution_is_that_of_the_growing_system(solver: str, metric: str) -> None:
    """From no held row to many more than there are unknowns (at most E * h = 20)."""
    case, parts = Case(solver, metric), batches(13, 3)
    held = case.held()
    for number, new in enumerate(parts):
        rows = parts[:number]
        held.hold(dict(enumerate(rows)))
        assert held.num_rows == 3 * number
        update = case.check(held, rows, new, residual_of(3))
        assert max(len(columns) for columns in update.columns) <= 3
    if isinstance(held, HeldSystem):
        assert held.numbers == held.coordinates.size**2 < held.num_rows**2


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("many", [6, 14])
def test_rows_are_released(solver: str, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case, parts = Case(solver, "identity"), batches(many, 2)
    held, names = case.held(), list(range(many))
    held.hold({name: parts[name] for name in names})
    begun: list[int] = []
    monkeypatch.setattr(type(held), "_begin", lambda self, rows: begun.append(1))
    for kept in (names[1:], [n for n in names if n not in (0, many - 2)], names[2:-1]):
        held.hold({name: parts[name] for name in kept})
        rows = [parts[name] for name in held.rows]
        assert sorted(held.rows) == sorted(kept)
        case.check(held, rows, batches(1, 2, seed=9)[0], residual_of(2))
    assert not begun


def test_inverses_are_computed_anew_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_module, "REFRESH", 8)
    case, parts, begun = Case("exact", "covariance", 1e-4), batches(60, 1), []
    held = case.held()
    begin = HeldSystem._begin
    monkeypatch.setattr(HeldSystem, "_begin", lambda self, rows: (begun.append(len(rows)), begin(self, rows)))
    for number in range(len(parts)):
        held.hold(dict(enumerate(parts[:number])))
    case.check(held, parts[:-1], parts[-1], residual_of(1))
    assert begun == [9, 18, 36]


def test_moments_of_single_experts_would_not_do() -> None:
    """A token's experts are held together: two batches with the same second moments per expert, and other solutions."""
    key = torch.eye(H)[:2].repeat(1, 1, 1).double()
    joint = RoutedKeys(torch.tensor([[0, 1]]), torch.ones(1, 2).double(), key)
    apart = RoutedKeys(torch.tensor([[0], [1]]), torch.ones(2, 1).double(), key.transpose(0, 1))
    new = RoutedKeys(torch.tensor([[0, 1]]), torch.ones(1, 2).double(), torch.ones(1, 2, H).double())
    case, found = Case("exact", "identity"), []
    for rows in (joint, apart):
        held = case.held()
        held.hold({"all": rows})
        found.append(case.check(held, [rows], new, residual_of(1)).dense(E))
    assert (found[0] - found[1]).norm() > 0.05 * found[0].norm()


@pytest.mark.parametrize("count", [7, 10, 40])
def test_experts_and_facts_of_other_sizes(count: int) -> None:
    """Batches of changing size and number of experts per token, as several contexts make them."""
    g = torch.Generator().manual_seed(count)
    parts = [routed(1 + n % 3, E, 1 + n % 4, H, g, torch.float64) for n in range(count)]
    for solver in SOLVERS:
        case = Case(solver, "nullspace", RIDGE)
        held = case.held()
        for number in range(count):
            held.hold(dict(enumerate(parts[:number])))
        new = parts[-1]
        case.check(held, parts[:-1], new, residual_of(new.num_tokens))


# ---------------------------------------------------------------- BCD by colours


def one_after_the_other(
    keys: RoutedKeys, residual: Tensor, held: HeldMoment, case: ExpertCoordinates, orders: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Unknowns ``[N, d]`` and objectives of block coordinate descent on the dense normal equations, float64."""
    phi, wanted = case.features(case.encode(keys)), residual.double()
    system = phi @ phi.T + held.moment
    right, solution = phi @ wanted, torch.zeros(case.size, residual.shape[1], dtype=torch.float64)

    def objective() -> float:
        tied = (solution * (held.moment @ solution)).sum()
        return float(((wanted - phi.T @ solution) ** 2).sum() + tied + LAMBDA * (solution**2).sum())

    history = [objective()]
    for order in orders:
        for expert in order.tolist():
            own = slice(case.starts[expert], case.starts[expert] + case.sizes[expert])
            rest = right[own] - system[own] @ solution + system[own, own] @ solution[own]
            ridge = LAMBDA * torch.eye(case.sizes[expert], dtype=torch.float64)
            solution[own] = torch.linalg.solve(system[own, own] + ridge, rest)
        history.append(objective())
    return solution, torch.tensor(history, dtype=torch.float64)


@pytest.mark.parametrize("layout", ["pairs", "any", "one token", "no held row", "held experts only"])
@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("wide", [0.0, float("inf")], ids=["by colours", "one by one"])
def test_held_bcd_is_the_sweep_one_after_the_other(
    wide: float, kind: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where held rows tie few experts together, where they tie all, and where new rows reach none of them."""
    monkeypatch.setattr(held_bcd, "LEAST_WIDTH", wide)
    experts, draw = 12, torch.Generator().manual_seed(2)
    metric = IdentityMetric()
    if kind != "identity":
        metric = (planted_projectors if kind == "nullspace" else random_covariances)(experts, H, draw)[0]
    case = ExpertCoordinates(metric, experts, H, torch.device("cpu"))
    orders = expert_orders(experts, 3, seed=5)

    def rows(count: int, pairs: bool, first: int = 0) -> RoutedKeys:
        start = torch.randint((experts - first) // 2, (count, 1), generator=draw) * 2 + first
        anywhere = torch.rand(count, experts, generator=draw).topk(2).indices
        expert = torch.cat([start, start + 1], dim=1) if pairs else anywhere
        gate = torch.rand(count, 2, generator=draw) + 0.1
        return RoutedKeys(expert, gate, torch.randn(count, 2, H, generator=draw))

    held = HeldMoment(case)
    if layout != "no held row":
        held.hold({n: rows(3, layout != "any", 6 if "only" in layout else 0) for n in range(9)})
    else:
        held.moment = torch.zeros(case.size, case.size, dtype=torch.float64)
    keys = rows(1 if layout == "one token" else 5, "only" not in layout)
    residual = residual_of(keys.num_tokens)
    update, report = solve_bcd_held(keys, residual, LAMBDA, held, case, orders)
    wanted, history = one_after_the_other(keys, residual, held, case, orders)
    dense = torch.zeros(experts, D, H, dtype=torch.float64)
    for expert, columns in case.lifted(wanted).items():
        dense[expert] = columns.mT
    torch.testing.assert_close(update.dense(experts), dense, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.tensor(report.objective, dtype=torch.float64), history, rtol=1e-10, atol=1e-11)


def test_experts_that_held_rows_do_not_tie_are_solved_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    right = held_bcd._Blocks.visit_together

    def watched(self: object, places: Tensor, state: object) -> None:
        sizes.append(len(places))
        right(self, places, state)

    monkeypatch.setattr(held_bcd._Blocks, "visit_together", watched)
    case = ExpertCoordinates(IdentityMetric(), 12, H, torch.device("cpu"))
    held, draw = HeldMoment(case), torch.Generator().manual_seed(0)
    expert = torch.arange(12).view(6, 2)
    held.hold({0: RoutedKeys(expert, torch.ones(6, 2), torch.randn(6, 2, H, generator=draw))})
    keys = RoutedKeys(expert[:3], torch.ones(3, 2), torch.randn(3, 2, H, generator=draw))
    solve_bcd_held(keys, residual_of(3), LAMBDA, held, case, [torch.arange(12)])
    assert sizes == [6, 6]


def test_waits_of_held_bcd_do_not_grow_with_experts_or_passes() -> None:
    counts = []
    for experts, passes in ((6, 1), (24, 1), (24, 5)):
        case = ExpertCoordinates(IdentityMetric(), experts, H, torch.device("cpu"))
        draw, held = torch.Generator().manual_seed(0), HeldMoment(case)
        held.hold({0: routed(40, experts, K, H, draw, torch.float64)})
        keys = routed(3, experts, K, H, draw, torch.float64)
        orders = expert_orders(experts, passes)
        with counted_syncs("cpu") as found:
            solve_bcd_held(keys, residual_of(3), LAMBDA, held, case, orders)
        # The orders are lists of the CPU's own.
        counts.append(found.total() - passes)
    # Where few experts share no row, no steps are copied to the device.
    assert counts[0] + 1 == counts[1] == counts[2] <= 16, counts
