"""The gauge of eq. 14: a core mapped back by another layer's factors must not depend on how these were computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from easyedit_moe.algebra.core import solve_core, solve_mote
from easyedit_moe.algebra.core_update import expand_core
from easyedit_moe.algebra.gauge import aligned_basis, aligned_factor, orthonormal_factor
from easyedit_moe.algebra.metric import IdentityMetric
from easyedit_moe.algebra.nullspace import null_space
from easyedit_moe.algebra.routed_keys import RoutedKeys
from easyedit_moe.algebra.tucker import TuckerBasis, tucker_basis
from easyedit_moe.errors import HyperParamsError

SHAPES = [((6, 10, 8), (4, 5, 6)), ((6, 10, 8), (6, 10, 8)), ((8, 7, 12), (3, 7, 5)), ((5, 16, 9), (5, 4, 9))]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed)).Q


def signs(size: int, seed: int) -> Tensor:
    return torch.diag(normal(size, seed=seed).sign())


def turned(basis: TuckerBasis, turn: object, seed: int) -> TuckerBasis:
    """The same spans, each factor's columns multiplied by a matrix of its own."""
    factors = ("u_expert", "u_out", "u_in")
    changed = {n: getattr(basis, n) @ turn(getattr(basis, n).shape[1], seed + i) for i, n in enumerate(factors)}
    return replace(basis, **changed)


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


class Problem:
    """Weights and statistics of two layers, and facts at the second."""

    def __init__(
        self, shape: tuple[int, int, int], whitening: str = "none", dtype: torch.dtype = torch.float64
    ) -> None:
        e, d, h = shape
        self.shape, self.whitening = shape, whitening
        self.weights = [normal(e, d, h, seed=seed).to(dtype) for seed in (1, 2)]
        keys = [normal(e, 4 * h, h, seed=seed) * torch.logspace(-2, 1, h) for seed in (3, 4)]
        self.moments = [(k.mT @ k / (4 * h)).to(dtype) for k in keys]
        self.out = [
            torch.eye(d).double() + 0.1 * normal(d, d, seed=seed) @ normal(d, d, seed=seed).T for seed in (8, 9)
        ]
        counts = torch.full((e,), 4 * h)
        self.metrics = [null_space(m, counts, 1e-3, relative=True) for m in self.moments]
        t = 7
        expert = torch.stack([torch.randperm(e, generator=torch.Generator().manual_seed(i))[:3] for i in range(t)])
        self.keys = RoutedKeys(expert, normal(t, 3, seed=5).abs().to(dtype), normal(t, 3, h, seed=6).to(dtype))
        self.residual = normal(t, d, seed=7).to(dtype)

    def bases(self, ranks: tuple[int, int, int]) -> list[TuckerBasis]:
        return [
            tucker_basis(w, *ranks, whitening=self.whitening, sigma_in=m.mean(0), sigma_out=out, whitening_eps=1e-3)
            for w, m, out in zip(self.weights, self.moments, self.out, strict=True)
        ]

    def update(self, bases: list[TuckerBasis], align: bool = True) -> Tensor:
        """The first layer's update by eq. 14, dense."""
        lower, last = bases
        core = solve_mote(self.keys, self.residual, 0.1, self.metrics[1], last)
        return expand_core(core, aligned_basis(lower, last) if align else lower, self.metrics[0]).dense(self.shape[0])


@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
@pytest.mark.parametrize("whitening", ["none", "in", "both"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_signs_and_rotations_of_the_factors_leave_the_update_alone(
    shape: tuple[int, int, int], ranks: tuple[int, int, int], whitening: str, dtype: torch.dtype
) -> None:
    problem = Problem(shape, whitening, dtype)
    bases = problem.bases(ranks)
    wanted, free = problem.update(bases), problem.update(bases, align=False)
    for turn in (signs, rotation):
        for which in ((0,), (1,), (0, 1)):
            other = [turned(b, turn, 10 * i + 20) if i in which else b for i, b in enumerate(bases)]
            found = problem.update(other)
            torch.testing.assert_close(found.norm(), wanted.norm(), rtol=1e-8, atol=0)
            assert cosine(found, wanted) > 1 - 1e-10
    flipped = problem.update([turned(bases[0], signs, 20), bases[1]], align=False)
    assert abs(cosine(flipped, free)) < 0.9  # what the paper's formula leaves open


@pytest.mark.parametrize("seed", range(3))
def test_near_equal_eigenvalues(seed: int) -> None:
    """All directions within the kept span have the same energy, so that rounding alone decides on eigenvectors."""
    problem = Problem((6, 10, 8))
    updates = []
    for noise in (0.0, 1e-9):
        bases = []
        for layer in range(2):
            e, o, i = (rotation(n, seed=50 * seed + 10 * layer + m)[:, :r] for m, (n, r) in
                       enumerate(((6, 4), (10, 4), (8, 4))))  # fmt: skip
            diagonal = torch.zeros(4, 4, 4, dtype=torch.float64)
            diagonal[range(4), range(4), range(4)] = 1.0
            weights = torch.einsum("abc,xa,yb,zc->xyz", diagonal, e, o, i)
            bases.append(tucker_basis(weights + noise * normal(6, 10, 8, seed=99), 4, 4, 4))
        updates.append((problem.update(bases), problem.update(bases, align=False)))
    (wanted, free), (found, other) = updates
    assert cosine(found, wanted) > 1 - 1e-5
    assert cosine(other, free) < 0.9


@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
def test_the_update_is_that_of_a_dense_procrustes_alignment(
    shape: tuple[int, int, int], ranks: tuple[int, int, int]
) -> None:
    problem = Problem(shape)
    lower, last = problem.bases(ranks)
    core = solve_core(problem.keys, problem.residual, 0.1, problem.metrics[1], last)
    factors = []
    for u, v in ((lower.u_expert, last.u_expert), (lower.u_out, last.u_out), (lower.u_in, last.u_in)):
        a, _, b = torch.linalg.svd(u.double().T @ v.double())
        factors.append(u.double() @ a @ b)
    wanted = torch.einsum("aoi,ja,do,hi->jdh", core, *factors)
    eye = torch.eye(shape[2], dtype=torch.float64)
    wanted = torch.stack([w @ problem.metrics[0].apply(j, eye) for j, w in enumerate(wanted)])
    torch.testing.assert_close(problem.update([lower, last]), wanted, rtol=0, atol=1e-9)


def test_no_rotation_is_nearer() -> None:
    u, v = rotation(9, 1)[:, :5], rotation(9, 2)[:, :5]
    found = aligned_factor(u, v)
    torch.testing.assert_close(found @ found.T, u @ u.T)  # the span and its scale stay
    assert all((found - v).norm() <= (u @ rotation(5, seed) - v).norm() for seed in range(50))
    assert (found - v).norm() < (u - v).norm()


def test_a_basis_is_its_own_gauge() -> None:
    basis = tucker_basis(
        normal(6, 10, 8, seed=1), 3, 5, 4, whitening="in", sigma_in=torch.diag(torch.logspace(-4, 4, 8))
    )
    own = aligned_basis(basis, basis)
    for name in ("u_expert", "u_out", "u_in"):
        torch.testing.assert_close(getattr(own, name), getattr(basis, name), rtol=1e-9, atol=1e-9)


def test_full_factors_take_over_the_reference() -> None:
    """Where nothing is left out there is nothing that a layer's own eigenvectors could add."""
    torch.testing.assert_close(aligned_factor(rotation(7, 1), rotation(7, 2)), rotation(7, 2))


def test_whitened_factors_do_not_depend_on_the_root_that_whitened() -> None:
    u = normal(7, 7, seed=1)
    first, second = aligned_factor(u, normal(7, 4, seed=3)), aligned_factor(u @ rotation(7, 2), normal(7, 4, seed=3))
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(orthonormal_factor(u).T @ orthonormal_factor(u), torch.eye(7).double())


def test_directions_without_counterpart_are_left_out() -> None:
    eye = torch.eye(5, dtype=torch.float64)
    found = aligned_factor(eye[:, [0, 1]], eye[:, [1, 3]])
    torch.testing.assert_close(found, torch.stack([eye[1], torch.zeros(5).double()], dim=1))
    assert aligned_factor(eye[:, [0, 1]], eye[:, [1, 3, 0]]).shape == (5, 3)  # more columns than the factor has


def test_layers_of_other_shapes_are_refused() -> None:
    problem = Problem((6, 10, 8))
    small = tucker_basis(normal(4, 10, 8, seed=1), 3, 5, 4)
    with pytest.raises(HyperParamsError, match=r"of size 4 .* has 6: .*spread: residual"):
        aligned_basis(small, problem.bases((3, 5, 4))[1])


def test_the_metric_is_the_layers_own() -> None:
    problem = Problem((6, 10, 8))
    bases = problem.bases((6, 10, 8))
    free = expand_core(
        solve_mote(problem.keys, problem.residual, 0.1, problem.metrics[1], bases[1]),
        aligned_basis(bases[0], bases[1]), IdentityMetric(),
    ).dense(6)  # fmt: skip
    assert cosine(free, problem.update(bases)) < 0.999
