"""Solvers against dense float64 references that share no code with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from reference import loop_psi, planted_projectors, random_covariances, routed
from torch import Tensor

from easyedit_moe.algebra import core as cores
from easyedit_moe.algebra import exact
from easyedit_moe.algebra.bcd import expert_orders, solve_bcd
from easyedit_moe.algebra.core import FactoredCore, core_features, solve_core, solve_mote
from easyedit_moe.algebra.core_update import expand_core
from easyedit_moe.algebra.exact import solve_exact
from easyedit_moe.algebra.metric import IdentityMetric, Metric, covariance_metric, objective
from easyedit_moe.algebra.nullspace import null_space
from easyedit_moe.algebra.routed_keys import FactoredUpdate, RoutedKeys
from easyedit_moe.algebra.systems import factor_ridge
from easyedit_moe.algebra.tucker import TuckerBasis, tucker_basis
from easyedit_moe.errors import HyperParamsError, NumericalError

METRICS = ["identity", "nullspace", "covariance"]
# (T, E, K, d, h)
SHAPES = {
    "experts never hit": (3, 9, 2, 4, 5),
    "experts shared by tokens": (6, 5, 2, 3, 7),
    "T_j > h": (14, 3, 2, 4, 4),
    "every expert hit by every token": (4, 3, 3, 5, 6),
    "one token": (1, 4, 3, 2, 5),
    "one expert": (5, 1, 1, 3, 4),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
metrics = pytest.mark.parametrize("metric", METRICS)


@dataclass
class Problem:
    """A random problem, with what a dense reference needs.

    Attributes:
        psi: ``[T, E, h]`` float64.
        m: ``[E, h, h]``, dense ``M_j``.
        inverse: ``[E, h, h]``, ``M_j^{-1}``; the pseudo-inverse for the null space.
    """

    keys: RoutedKeys
    residual: Tensor
    metric: Metric
    psi: Tensor
    m: Tensor
    inverse: Tensor

    @property
    def experts(self) -> int:
        return self.psi.shape[1]


def problem(shape: tuple, metric: str = "identity", seed: int = 0, dtype: torch.dtype = torch.float64) -> Problem:
    tokens, experts, width, d, h = shape
    g = torch.Generator().manual_seed(seed)
    keys = routed(tokens, experts, width, h, g, dtype)
    residual = torch.randn(tokens, d, generator=g, dtype=torch.float64).to(dtype)
    m = inverse = torch.eye(h, dtype=torch.float64).expand(experts, h, h)
    applied: Metric = IdentityMetric()
    if metric == "nullspace":
        applied, m = planted_projectors(experts, h, g)
        inverse = m
    elif metric == "covariance":
        applied, inverse = random_covariances(experts, h, g)
        m = torch.linalg.inv(inverse)
    return Problem(keys, residual, applied, loop_psi(keys, experts), m, inverse)


def dense_minimiser(p: Problem, lambda_reg: float) -> Tensor:
    """``[E, d, h]`` by the primal normal equations over all E * h inputs at once."""
    tokens, experts, h = p.psi.shape
    # Delta_j = A_j L_j^T with M_j = L_j L_j^T of full column rank, so the penalty is ||A||^2.
    roots = []
    for m in p.m:
        values, vectors = torch.linalg.eigh(m)
        roots.append((vectors * values.clamp_min(0).sqrt())[:, values > 1e-9])
    root = torch.block_diag(*roots)[: experts * h]
    features = p.psi.reshape(tokens, -1) @ root
    system = features.T @ features + lambda_reg * torch.eye(features.shape[1]).double()
    a = torch.linalg.solve(system, features.T @ p.residual.double())
    return (root @ a).reshape(experts, h, -1).transpose(1, 2)


def dense_objective(p: Problem, delta: Tensor, lambda_reg: float) -> float:
    lost = p.residual.double() - torch.einsum("tjh,jdh->td", p.psi, delta)
    penalty = torch.einsum("jdh,jhk,jdk->", delta, p.inverse, delta)
    return float((lost**2).sum() + lambda_reg * penalty)


def naive_bcd(p: Problem, lambda_reg: float, orders: list[Tensor]) -> tuple[Tensor, list[float]]:
    """Dense updates; at each visit the residual is recomputed over all other experts, then an h x h system solved."""
    delta = torch.zeros(p.experts, p.residual.shape[1], p.psi.shape[2], dtype=torch.float64)
    history = [dense_objective(p, delta, lambda_reg)]
    eye = torch.eye(p.psi.shape[2], dtype=torch.float64)
    for order in orders:
        for j in order.tolist():
            rest = p.residual.double().T.clone()
            for other in range(p.experts):
                if other != j:
                    rest -= delta[other] @ p.psi[:, other].T
            z = p.psi[:, j].T
            # rest Z^T M (Z Z^T M + lambda I)^{-1}, which needs no inverse of M.
            delta[j] = torch.linalg.solve((z @ z.T @ p.m[j] + lambda_reg * eye).T, (rest @ z.T @ p.m[j]).T).T
        history.append(dense_objective(p, delta, lambda_reg))
    return delta, history


def close(actual: Tensor, wanted: Tensor, tol: float = 1e-9) -> None:
    assert actual.dtype == wanted.dtype == torch.float64
    torch.testing.assert_close(actual, wanted, rtol=tol, atol=tol * max(1.0, float(wanted.abs().max())))


# --- exact ---


@shapes
@metrics
@pytest.mark.parametrize("lambda_reg", [1e-2, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_exact_solves_the_dense_normal_equations(shape: tuple, metric: str, lambda_reg: float, seed: int) -> None:
    p = problem(shape, metric, seed)
    update = solve_exact(p.keys, p.residual, lambda_reg, p.metric)
    delta = update.dense(p.experts)
    close(delta, dense_minimiser(p, lambda_reg))
    wanted = dense_objective(p, delta, lambda_reg)
    assert objective(p.keys, p.residual, lambda_reg, p.metric, update) == pytest.approx(wanted, rel=1e-9)


@shapes
@pytest.mark.parametrize("metric", ["identity", "covariance"])
def test_exact_has_zero_gradient(shape: tuple, metric: str) -> None:
    p = problem(shape, metric, seed=2)
    delta = solve_exact(p.keys, p.residual, 0.3, p.metric).dense(p.experts).requires_grad_()
    lost = p.residual - torch.einsum("tjh,jdh->td", p.psi, delta)
    value = (lost**2).sum() + 0.3 * torch.einsum("jdh,jhk,jdk->", delta, p.inverse, delta)
    (gradient,) = torch.autograd.grad(value, delta)
    close(gradient, torch.zeros_like(gradient))


@shapes
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_null_space_update_is_optimal_within_its_constraint(shape: tuple, seed: int) -> None:
    p = problem(shape, "nullspace", seed)
    delta = solve_exact(p.keys, p.residual, 0.3, p.metric).dense(p.experts)
    close(delta @ p.m, delta)
    lost = p.residual - torch.einsum("tjh,jdh->td", p.psi, delta)
    gradient = -2 * torch.einsum("td,tjh->jdh", lost, p.psi) + 2 * 0.3 * delta
    close(gradient @ p.m, torch.zeros_like(gradient))
    # Preserved keys (the complement of range P) yield what they did.
    preserved = torch.eye(shape[4], dtype=torch.float64) - p.m
    assert (delta @ preserved).abs().max() < 1e-9


@shapes
@metrics
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_are_solved_in_float64(shape: tuple, metric: str, dtype: torch.dtype) -> None:
    p = problem(shape, metric, seed=3, dtype=dtype)
    close(solve_exact(p.keys, p.residual, 0.1, p.metric).dense(p.experts), dense_minimiser(p, 0.1))


def test_experts_never_hit_have_no_update() -> None:
    p = problem(SHAPES["experts never hit"])
    hit = sorted(set(p.keys.expert.flatten().tolist()))
    assert len(hit) < p.experts
    update = solve_exact(p.keys, p.residual, 0.1, p.metric)
    assert list(update.experts) == hit
    norms = update.dense(p.experts).flatten(1).norm(dim=1)
    assert [j for j, n in enumerate(norms.tolist()) if n > 0] == hit


def pad(keys: RoutedKeys) -> RoutedKeys:
    """One more slot per token, naming expert 0 with gate 0."""
    grow = torch.nn.functional.pad
    return RoutedKeys(grow(keys.expert, (0, 1)), grow(keys.gate, (0, 1)), grow(keys.key, (0, 0, 0, 1)))


@shapes
@metrics
def test_padded_slots_change_no_solution(shape: tuple, metric: str) -> None:
    p = problem(shape, metric, seed=4)
    orders = expert_orders(p.experts, 3)
    for solve in (
        lambda keys: solve_exact(keys, p.residual, 0.1, p.metric),
        lambda keys: solve_bcd(keys, p.residual, 0.1, p.metric, orders)[0],
    ):
        close(solve(pad(p.keys)).dense(p.experts), solve(p.keys).dense(p.experts))


@shapes
@pytest.mark.parametrize("metric", ["identity", "nullspace"])
@pytest.mark.parametrize("remembered", [1, 6])
def test_remembered_edits_follow_alphaedits_closed_form(shape: tuple, metric: str, remembered: int) -> None:
    """``Delta = R K^T P (Kp Kp^T P + K K^T P + lambda I)^{-1}``, lifted to the stacked experts."""
    tokens, experts, width, d, h = shape
    p = problem(shape, metric, seed=5)
    earlier = routed(remembered, experts, width, h, torch.Generator().manual_seed(99), torch.float64)
    residual = torch.cat([torch.zeros(remembered, d, dtype=torch.float64), p.residual])
    update = solve_exact(RoutedKeys.cat([earlier, p.keys]), residual, 0.2, p.metric)

    projector = torch.block_diag(*p.m)
    k, kp = p.psi.reshape(tokens, -1).T, loop_psi(earlier, experts).reshape(remembered, -1).T
    system = kp @ kp.T @ projector + k @ k.T @ projector + 0.2 * torch.eye(experts * h).double()
    wanted = p.residual.T @ k.T @ projector @ torch.linalg.inv(system)
    close(update.dense(experts), wanted.reshape(d, experts, h).transpose(0, 1).contiguous())


def test_remembering_an_edit_moves_it_less() -> None:
    p = problem((4, 3, 2, 5, 6), seed=6)
    earlier = routed(3, 3, 2, 6, torch.Generator().manual_seed(7), torch.float64)
    residual = torch.cat([torch.zeros(3, 5, dtype=torch.float64), p.residual])
    forgetful = solve_exact(p.keys, p.residual, 1e-3, p.metric)
    mindful = solve_exact(RoutedKeys.cat([earlier, p.keys]), residual, 1e-3, p.metric)
    assert mindful.apply(earlier).norm() < 0.05 * forgetful.apply(earlier).norm()


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("lambda_reg", [0.0, 1e-10])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_token_with_the_covariance_is_rome_lifted(width: int, lambda_reg: float, seed: int) -> None:
    """``Delta = r (C^{-1} k)^T / (k^T C^{-1} k)`` with k the stacked gated keys and C block-diagonal."""
    experts, d, h = 4, 3, 5
    p = problem((1, experts, width, d, h), "covariance", seed)
    delta = solve_exact(p.keys, p.residual, lambda_reg, p.metric).dense(experts)
    stacked = delta.transpose(0, 1).reshape(d, -1)
    k, r = p.psi.flatten(), p.residual[0]
    tol = 1e-9 if lambda_reg == 0 else 1e-7
    close(stacked @ k, r, tol)
    direction = torch.linalg.solve(torch.block_diag(*p.inverse), k)
    close(stacked, torch.outer(r, direction) / (k @ direction), tol)
    assert torch.linalg.matrix_rank(stacked) == 1


# --- covariance metric ---


@pytest.mark.parametrize("choice", ["keep", "identity", "pooled", "frozen"])
def test_covariance_of_thin_experts_is_the_callers_choice(choice: str) -> None:
    g = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 9, 4, generator=g, dtype=torch.float64)
    moments = keys.mT @ keys / 9
    counts = torch.tensor([90, 10])
    scale = float(90 * moments[0].trace() + 10 * moments[1].trace()) / 4 / 100
    ridge = 0.1 * scale * torch.eye(4, dtype=torch.float64)
    metric = covariance_metric(moments, counts, 0.1, min_count=20, low_coverage=choice)
    x = torch.randn(4, 3, dtype=torch.float64)
    close(metric.apply(0, x), torch.linalg.solve(moments[0] + ridge, x))
    thin = {
        "keep": lambda: torch.linalg.solve(moments[1] + ridge, x),
        "identity": lambda: x / scale,
        "pooled": lambda: torch.linalg.solve(0.9 * moments[0] + 0.1 * moments[1] + ridge, x),
        "frozen": lambda: torch.zeros_like(x),
    }[choice]()
    close(metric.apply(1, x), thin)


def test_a_frozen_expert_is_not_edited() -> None:
    p = problem(SHAPES["experts shared by tokens"], seed=1)
    moments = torch.eye(7, dtype=torch.float64).repeat(5, 1, 1)
    counts = torch.tensor([50, 50, 3, 50, 50])
    metric = covariance_metric(moments, counts, 0.0, min_count=10, low_coverage="frozen")
    assert 2 in p.keys.expert
    norms = solve_exact(p.keys, p.residual, 0.1, metric).dense(5).flatten(1).norm(dim=1)
    assert norms[2] == 0
    assert (norms[[0, 1, 3, 4]] > 0).all()


@pytest.mark.parametrize("seed", range(20))
def test_a_rank_deficient_covariance_without_ridge_is_an_error(seed: int) -> None:
    keys = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moments = torch.stack([torch.eye(4, dtype=torch.float64), keys.T @ keys / 3])
    with pytest.raises(NumericalError, match=r"expert 1 \(3 tokens, h = 4\)"):
        covariance_metric(moments, torch.tensor([50, 3]), 0.0)
    assert covariance_metric(moments, torch.tensor([50, 3]), 1e-3).factors[1] is not None


def test_covariance_metric_refuses_what_it_cannot_use() -> None:
    moments, counts = torch.eye(3).repeat(2, 1, 1), torch.tensor([9, 9])
    with pytest.raises(HyperParamsError, match="covariance_ridge"):
        covariance_metric(moments, counts, -1e-3)
    with pytest.raises(NumericalError, match="NaN or infinity"):
        covariance_metric(moments * float("nan"), counts, 1e-3)
    with pytest.raises(NumericalError, match="no scale"):
        covariance_metric(0 * moments, 0 * counts, 1e-3, min_count=1, low_coverage="identity")


# --- block coordinate descent ---


@shapes
@metrics
@pytest.mark.parametrize("passes", [1, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_bcd_equals_the_naive_implementation(shape: tuple, metric: str, passes: int, seed: int) -> None:
    p = problem(shape, metric, seed)
    orders = expert_orders(p.experts, passes, seed=seed)
    update, report = solve_bcd(p.keys, p.residual, 0.2, p.metric, orders)
    wanted, history = naive_bcd(p, 0.2, orders)
    close(update.dense(p.experts), wanted, 1e-8)
    assert report.objective == pytest.approx(history, rel=1e-8)
    assert objective(p.keys, p.residual, 0.2, p.metric, update) == pytest.approx(history[-1], rel=1e-8)


@shapes
@metrics
@pytest.mark.parametrize("seed", [0, 1])
def test_bcd_falls_monotonically_to_the_exact_optimum(shape: tuple, metric: str, seed: int) -> None:
    p = problem(shape, metric, seed)
    update, report = solve_bcd(p.keys, p.residual, 2.0, p.metric, expert_orders(p.experts, 400))
    history = report.objective
    assert len(history) == 401
    assert history[0] == pytest.approx(float((p.residual**2).sum()))
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(history))
    best = dense_minimiser(p, 2.0)
    assert history[-1] == pytest.approx(dense_objective(p, best, 2.0), rel=1e-10)
    close(update.dense(p.experts), best, 1e-6)


@metrics
def test_a_few_passes_stop_short_of_the_optimum(metric: str) -> None:
    p = problem(SHAPES["experts shared by tokens"], metric)
    best = dense_objective(p, dense_minimiser(p, 0.05), 0.05)
    history = solve_bcd(p.keys, p.residual, 0.05, p.metric, expert_orders(5, 2))[1].objective
    assert history[0] > history[1] > history[2] > best * (1 + 1e-6)


def test_the_order_of_visits_matters_and_only_visited_experts_change() -> None:
    p = problem(SHAPES["experts shared by tokens"])
    forward, backward = torch.arange(5), torch.arange(5).flip(0)
    first = solve_bcd(p.keys, p.residual, 0.1, p.metric, [forward])[0].dense(5)
    second = solve_bcd(p.keys, p.residual, 0.1, p.metric, [backward])[0].dense(5)
    assert (first - second).norm() > 0.01 * first.norm()
    only = solve_bcd(p.keys, p.residual, 0.1, p.metric, [torch.tensor([2])])[0].dense(5)
    assert only[2].norm() > 0
    assert only[[0, 1, 3, 4]].norm() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bcd_takes_low_precision_inputs_and_leaves_them_alone(dtype: torch.dtype) -> None:
    p = problem(SHAPES["experts shared by tokens"], "nullspace", dtype=dtype)
    before = p.residual.clone()
    orders = expert_orders(5, 3)
    close(solve_bcd(p.keys, p.residual, 0.2, p.metric, orders)[0].dense(5), naive_bcd(p, 0.2, orders)[0], 1e-8)
    assert torch.equal(p.residual, before)


def test_bcd_does_not_write_into_a_float64_residual() -> None:
    p = problem(SHAPES["experts shared by tokens"])
    before = p.residual.clone()
    solve_bcd(p.keys, p.residual, 0.2, p.metric, expert_orders(5, 1))
    assert torch.equal(p.residual, before)


def test_expert_orders_are_those_of_torch_randperm_seeded_42() -> None:
    generator = torch.Generator()
    generator.manual_seed(42)
    wanted = [torch.randperm(11, generator=generator).tolist() for _ in range(4)]
    assert [o.tolist() for o in expert_orders(11, 4)] == wanted
    assert len({tuple(o) for o in wanted}) == 4


def test_expert_orders_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first = [o.tolist() for o in expert_orders(11, 3, seed=5)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1234)
    assert [o.tolist() for o in expert_orders(11, 3, seed=5)] == first
    assert [o.tolist() for o in expert_orders(11, 3, seed=6)] != first
    assert all(sorted(o) == list(range(11)) for o in first)


@pytest.mark.parametrize("passes", [0, -1])
def test_bcd_needs_a_pass(passes: int) -> None:
    p = problem(SHAPES["one token"])
    with pytest.raises(HyperParamsError, match="num_passes"):
        solve_bcd(p.keys, p.residual, 0.1, p.metric, expert_orders(4, passes))


# --- Tucker core ---


def random_basis(shape: tuple, ranks: tuple, whitening: str = "none", seed: int = 0) -> TuckerBasis:
    _, experts, _, d, h = shape
    g = torch.Generator().manual_seed(seed + 1000)
    weights = torch.randn(experts, d, h, generator=g, dtype=torch.float64)
    x, y = (torch.randn(3 * n, n, generator=g, dtype=torch.float64) for n in (h, d))
    scale = torch.logspace(-0.5, 0.5, d, dtype=torch.float64)
    return tucker_basis(weights, *ranks, 0, whitening, x.T @ x / len(x), (y * scale).T @ (y * scale) / len(y), 1e-2)


def expanded(core: Tensor, basis: TuckerBasis, m: Tensor) -> Tensor:
    """``U_out (sum_a U_e[j,a] G_a) U_in^T M_j`` as ``[E, d, h]``."""
    return torch.einsum("ja,aoi,do,hi,jhk->jdk", basis.u_expert, core, basis.u_out, basis.u_in, m)


def dense_core(p: Problem, basis: TuckerBasis, lambda_reg: float) -> Tensor:
    """Minimiser over the core of ``sum ||r - U_out G phi||^2 + lambda ||U_out G||^2`` by an explicit design.

    Column n of the design is what the n-th unit core does to all tokens, and to the penalised ``U_out G``.
    """
    ranks = (basis.u_expert.shape[1], basis.u_out.shape[1], basis.u_in.shape[1])
    columns = []
    for unit in torch.eye(ranks[0] * ranks[1] * ranks[2], dtype=torch.float64):
        core = unit.reshape(ranks)
        moved = torch.einsum("tjh,jdh->td", p.psi, expanded(core, basis, p.m))
        penalised = torch.einsum("do,aoi->adi", basis.u_out, core)
        columns.append(torch.cat([moved.flatten(), lambda_reg**0.5 * penalised.flatten()]))
    design = torch.stack(columns, dim=1)
    wanted = torch.zeros(design.shape[0], dtype=torch.float64)
    wanted[: p.residual.numel()] = p.residual.double().flatten()
    return torch.linalg.solve(design.T @ design, design.T @ wanted).reshape(ranks)


@shapes
@pytest.mark.parametrize("metric", ["identity", "nullspace"])
@pytest.mark.parametrize("form", ["auto", "dual", "primal"])
def test_core_with_full_ranks_is_the_exact_update(shape: tuple, metric: str, form: str) -> None:
    p = problem(shape, metric, seed=1)
    basis = random_basis(shape, (1.0, 1.0, 1.0))
    core = solve_core(p.keys, p.residual, 0.2, p.metric, basis, form)
    close(
        expand_core(core, basis, p.metric).dense(p.experts),
        solve_exact(p.keys, p.residual, 0.2, p.metric).dense(p.experts),
        1e-8,
    )


RANKS = [(1, 1, 1), (1, 2, 3), (0.6, 0.5, 0.7)]


def fit(ranks: tuple, shape: tuple) -> tuple:
    return tuple(min(r, n) if isinstance(r, int) else r for r, n in zip(ranks, (shape[1], *shape[3:]), strict=True))


@shapes
@metrics
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("whitening", ["none", "in", "out", "both"])
def test_core_minimises_its_ridge_objective(shape: tuple, metric: str, ranks: tuple, whitening: str) -> None:
    p = problem(shape, metric, seed=2)
    basis = random_basis(shape, fit(ranks, shape), whitening)
    wanted = dense_core(p, basis, 0.2)
    for form in ("auto", "dual", "primal"):
        core = solve_core(p.keys, p.residual, 0.2, p.metric, basis, form)
        assert core.shape == wanted.shape
        close(core, wanted, 1e-8)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_core_nearby_does_better_when_u_out_is_not_orthonormal(seed: int) -> None:
    shape = SHAPES["experts shared by tokens"]
    p, basis = problem(shape, "nullspace", seed), random_basis(shape, (2, 2, 3), "out", seed)
    assert not torch.allclose(basis.u_out.T @ basis.u_out, torch.eye(2).double(), atol=0.1)

    def value(core: Tensor) -> float:
        lost = p.residual - torch.einsum("tjh,jdh->td", p.psi, expanded(core, basis, p.m))
        return float((lost**2).sum() + 0.2 * (torch.einsum("do,aoi->adi", basis.u_out, core) ** 2).sum())

    core = solve_core(p.keys, p.residual, 0.2, p.metric, basis)
    for _ in range(20):
        assert value(core + 1e-3 * torch.randn_like(core)) > value(core)


@shapes
@metrics
def test_core_features_and_expansion_agree_with_einsum(shape: tuple, metric: str) -> None:
    p, basis = problem(shape, metric, seed=3), random_basis(shape, (1.0, 0.5, 0.6), "both")
    phi = core_features(p.keys, basis, p.metric)
    wanted = torch.einsum("ja,hi,jhk,tjk->tai", basis.u_expert, basis.u_in, p.m, p.psi)
    close(phi, wanted.flatten(1))
    core = torch.randn(*(f.shape[1] for f in (basis.u_expert, basis.u_out, basis.u_in)), dtype=torch.float64)
    update = expand_core(core, basis, p.metric)
    close(update.dense(p.experts), expanded(core, basis, p.m))
    # U_out G phi_t is what the update does to token t.
    flat = core.transpose(0, 1).flatten(1)
    close(update.apply(p.keys), phi @ flat.T @ basis.u_out.T)


def test_core_takes_low_precision_inputs() -> None:
    shape = SHAPES["experts shared by tokens"]
    p, basis = problem(shape, "nullspace", dtype=torch.float32), random_basis(shape, (3, 2, 4))
    close(solve_core(p.keys, p.residual, 0.2, p.metric, basis), dense_core(p, basis, 0.2), 1e-8)


def test_a_core_updates_experts_that_no_token_hit() -> None:
    shape = SHAPES["experts never hit"]
    p, basis = problem(shape), random_basis(shape, (2, 4, 5))
    update = expand_core(solve_core(p.keys, p.residual, 0.2, p.metric, basis), basis, p.metric)
    assert update.experts == tuple(range(9))
    assert (update.dense(9).flatten(1).norm(dim=1) > 0).all()


def test_unknown_form() -> None:
    shape = SHAPES["one token"]
    p, basis = problem(shape), random_basis(shape, (2, 2, 2))
    with pytest.raises(HyperParamsError, match="auto, dual or primal; found 'woodbury'"):
        solve_core(p.keys, p.residual, 0.2, p.metric, basis, "woodbury")


# --- errors ---

Solve = Callable[[RoutedKeys, Tensor, float, Metric], object]


def core_solver(form: str) -> Solve:
    def solve(keys: RoutedKeys, residual: Tensor, lambda_reg: float, metric: Metric) -> object:
        shape = (keys.num_tokens, 5, 2, residual.shape[1], keys.d_hidden)
        return solve_core(keys, residual, lambda_reg, metric, random_basis(shape, (1.0, 1.0, 1.0)), form)

    return solve


SOLVERS: dict[str, Solve] = {
    "exact": solve_exact,
    "bcd": lambda keys, r, lam, metric: solve_bcd(keys, r, lam, metric, expert_orders(5, 2)),
    "dual": core_solver("dual"),
    "primal": core_solver("primal"),
}
solvers = pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS.keys())


@solvers
@pytest.mark.parametrize("lambda_reg", [-1e-9, -1.0, float("nan"), float("inf")])
def test_lambda_out_of_range(solve: Solve, lambda_reg: float) -> None:
    p = problem((4, 5, 2, 3, 6))
    with pytest.raises(HyperParamsError, match="lambda_reg"):
        solve(p.keys, p.residual, lambda_reg, p.metric)


@solvers
@pytest.mark.parametrize("part", ["key", "gate"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_keys_that_are_not_finite(solve: Solve, part: str, bad: float) -> None:
    p = problem((4, 5, 2, 3, 6))
    getattr(p.keys, part)[2, 1] = bad
    with pytest.raises(NumericalError, match="NaN or infinity"):
        solve(p.keys, p.residual, 0.1, p.metric)


@solvers
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_residuals_that_are_not_finite(solve: Solve, bad: float) -> None:
    p = problem((4, 5, 2, 3, 6))
    p.residual[1, 2] = bad
    with pytest.raises(NumericalError, match="residuals hold NaN or infinity"):
        solve(p.keys, p.residual, 0.1, p.metric)


def with_a_twin(keys: RoutedKeys) -> RoutedKeys:
    """The last token repeats the first one."""
    return RoutedKeys.cat([keys, RoutedKeys(keys.expert[:1], keys.gate[:1], keys.key[:1])])


# Where rounding leaves the singular matrix a tiny positive pivot, a plain Cholesky factorisation goes through.
@pytest.mark.parametrize("solve", [SOLVERS[n] for n in ("exact", "bcd", "dual")], ids=["exact", "bcd", "dual"])
@pytest.mark.parametrize("seed", range(12))
def test_two_requests_with_one_key_are_singular_without_ridge(solve: Solve, seed: int) -> None:
    p = problem((5, 5, 2, 3, 8), seed=seed)
    keys = with_a_twin(p.keys)
    residual = torch.cat([p.residual, p.residual[:1] + 1])
    with pytest.raises(NumericalError, match="singular at lambda_reg 0"):
        solve(keys, residual, 0.0, p.metric)
    solve(keys, residual, 1e-6, p.metric)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("shape", [(5, 1, 1, 2, 4), (9, 2, 2, 2, 4)])
def test_more_requests_than_dimensions_are_singular_without_ridge(shape: tuple, seed: int) -> None:
    p = problem(shape, seed=seed)
    with pytest.raises(NumericalError, match="singular"):
        solve_exact(p.keys, p.residual, 0.0, p.metric)


def test_a_key_with_nothing_left_in_the_null_space_is_singular_without_ridge() -> None:
    p = problem((2, 5, 2, 3, 6))
    closed = null_space(torch.eye(6).repeat(5, 1, 1), torch.full((5,), 99), 1e-6)
    with pytest.raises(NumericalError, match="null space"):
        solve_exact(p.keys, p.residual, 0.0, closed)
    assert solve_exact(p.keys, p.residual, 0.1, closed).dense(5).abs().max() == 0


def test_a_regular_system_needs_no_ridge_however_its_rows_are_scaled() -> None:
    p = problem((4, 5, 2, 3, 8), seed=1)
    scaled = RoutedKeys(p.keys.expert, p.keys.gate * torch.tensor([1e-5, 1.0, 10.0, 1e3])[:, None].double(), p.keys.key)
    for keys in (p.keys, scaled):
        close(solve_exact(keys, p.residual, 0.0, p.metric).apply(keys), p.residual, 1e-6)


def test_factor_ridge_is_the_cholesky_factor() -> None:
    a = torch.randn(6, 6, dtype=torch.float64)
    gram = a @ a.T
    factor = factor_ridge(gram, 0.5)
    assert torch.equal(factor, factor.tril())
    close(factor @ factor.T, gram + 0.5 * torch.eye(6).double())


def test_no_requests_give_no_update() -> None:
    keys = RoutedKeys(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), torch.zeros(0, 2, 4))
    residual = torch.zeros(0, 3)
    updates = [
        solve_exact(keys, residual, 0.1, IdentityMetric()),
        solve_bcd(keys, residual, 0.1, IdentityMetric(), expert_orders(5, 1))[0],
    ]
    for update in updates:
        assert isinstance(update, FactoredUpdate)
        assert update.experts == ()
        assert update.left.shape[0] == 3


# --- forms, chunks and factored cores ---


@shapes
@metrics
@pytest.mark.parametrize("chunk", [1, 2**23])
def test_exact_primal_and_dual_agree(shape: tuple, metric: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cores, exact):
        monkeypatch.setattr(module, "CHUNK", chunk)
    p = problem(shape, metric, seed=8)
    wanted = dense_minimiser(p, 0.2)
    for form in ("dual", "primal"):
        update = solve_exact(p.keys, p.residual, 0.2, p.metric, form)
        close(update.dense(p.experts), wanted)
        best = dense_objective(p, wanted, 0.2)
        assert objective(p.keys, p.residual, 0.2, p.metric, update) == pytest.approx(best, rel=1e-9)


@metrics
def test_more_requests_than_unknowns_are_solved_on_the_smaller_side(metric: str) -> None:
    """2000 requests on 4 experts of width 6: 24 unknowns, and factors that are no thicker than an expert."""
    p = problem((2000, 4, 2, 3, 6), metric, seed=1)
    wanted = dense_minimiser(p, 0.5)
    exact = solve_exact(p.keys, p.residual, 0.5, p.metric)
    close(exact.dense(4), wanted, 1e-8)
    assert all(right.shape[1] <= 6 for right in exact.right)
    update, report = solve_bcd(p.keys, p.residual, 0.5, p.metric, expert_orders(4, 100))
    assert all(right.shape[1] <= 6 for right in update.right)
    close(update.dense(4), wanted, 1e-6)
    assert report.objective[-1] == pytest.approx(dense_objective(p, wanted, 0.5), rel=1e-9)


@pytest.mark.parametrize("lambda_reg", [0.0, 1e-18])
@pytest.mark.parametrize("solve", [SOLVERS[n] for n in ("exact", "bcd")], ids=["exact", "bcd"])
def test_no_form_hides_that_a_system_is_singular(solve: Solve, lambda_reg: float) -> None:
    p = problem((40, 5, 2, 3, 4), seed=2)
    with pytest.raises(NumericalError, match="singular"):
        solve(p.keys, p.residual, lambda_reg, p.metric)


def test_exact_refuses_an_unknown_form() -> None:
    p = problem(SHAPES["one token"])
    with pytest.raises(HyperParamsError, match="auto, dual or primal; found 'woodbury'"):
        solve_exact(p.keys, p.residual, 0.1, p.metric, "woodbury")


@shapes
@metrics
def test_roots_of_a_metric(shape: tuple, metric: str) -> None:
    p = problem(shape, metric)
    x = torch.randn(shape[4], 3, dtype=torch.float64)
    for j in range(p.experts):
        y = p.metric.root(j, x)
        close(p.metric.lift(j, y), p.m[j] @ x, 1e-8)
        close(y.T @ y, x.T @ p.m[j] @ x, 1e-8)
        close(p.metric.inverse(j, p.metric.apply(j, x)), p.inverse[j] @ p.m[j] @ x, 1e-8)


@metrics
@pytest.mark.parametrize("tokens", [2, 12])
def test_bcd_with_remembered_edits_equals_the_naive_implementation(metric: str, tokens: int) -> None:
    p = problem((tokens, 5, 2, 6, 4), metric, seed=9)
    p.residual[: tokens // 2] = 0
    orders = expert_orders(5, 3)
    update, report = solve_bcd(p.keys, p.residual, 0.2, p.metric, orders)
    wanted, history = naive_bcd(p, 0.2, orders)
    close(update.dense(5), wanted, 1e-8)
    assert report.objective == pytest.approx(history, rel=1e-8)


@shapes
@metrics
@pytest.mark.parametrize("ranks", [(1, 2, 3), (1.0, 0.5, 0.6)], ids=["few experts' directions", "all of them"])
@pytest.mark.parametrize("chunk", [1, 2**23])
def test_a_factored_core_is_the_dense_one(
    shape: tuple, metric: str, ranks: tuple, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (cores, exact):
        monkeypatch.setattr(module, "CHUNK", chunk)
    p = problem(shape, metric, seed=10)
    basis = random_basis(shape, fit(ranks, shape), "both")
    other = random_basis(shape, fit(ranks, shape), "in", seed=5)
    factored = solve_mote(pad(p.keys), p.residual, 0.2, p.metric, basis, "dual")
    dense = solve_mote(p.keys, p.residual, 0.2, p.metric, basis, "primal")
    assert isinstance(factored, FactoredCore)
    close(factored.dense(), dense, 1e-8)
    # In its own basis, and in that of another layer, as update spread places it.
    for placed in (basis, other):
        update, wanted = expand_core(factored, placed, p.metric), expand_core(dense, placed, p.metric)
        close(update.dense(p.experts), wanted.dense(p.experts), 1e-8)
        assert max(len(c) for c in update.columns) <= min(len(p.keys.expert), basis.u_out.shape[1]) or ranks[0] == 1.0
    value = dense_objective(p, expand_core(dense, basis, p.metric).dense(p.experts), 0.2)
    if metric != "nullspace":
        update = expand_core(factored, basis, p.metric)
        assert objective(p.keys, p.residual, 0.2, p.metric, update) == pytest.approx(value, rel=1e-8)


def test_a_core_with_all_experts_directions_stays_as_thin_as_its_tokens() -> None:
    shape = (6, 9, 2, 8, 7)
    p, basis = problem(shape), random_basis(shape, (1.0, 1.0, 0.5))
    update = expand_core(solve_mote(p.keys, p.residual, 0.2, p.metric, basis), basis, p.metric)
    assert list(update.experts) == sorted(set(p.keys.expert.flatten().tolist()))
    assert sum(right.shape[1] for right in update.right) == p.keys.expert.numel()
