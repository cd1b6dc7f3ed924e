"""Projectors from second moments: planted subspaces, thresholds and the explicit choices for thin experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from easyedit_moe.algebra.nullspace import LOW_COVERAGE, ExpertProjector, null_space, pooled_moment, resolve_coverage
from easyedit_moe.errors import HyperParamsError, NumericalError

COUNTS = torch.tensor([500])


def subspace(h: int, rank: int, seed: int = 0) -> Tensor:
    """Orthonormal ``[h, rank]``."""
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(h, h, generator=g, dtype=torch.float64)).Q[:, :rank]


def planted_keys(basis: Tensor, n: int, seed: int = 0) -> Tensor:
    """``[n, h]`` keys that lie in span(basis)."""
    g = torch.Generator().manual_seed(seed + 100)
    return torch.randn(n, basis.shape[1], generator=g, dtype=torch.float64) @ basis.T


def moment(keys: Tensor) -> Tensor:
    return sum((torch.outer(k, k) for k in keys), torch.zeros(keys.shape[1], keys.shape[1]).double()) / len(keys)


def matrix(projector: ExpertProjector, h: int) -> Tensor:
    return projector(torch.eye(h, dtype=torch.float64))


@pytest.mark.parametrize("h", [6, 9])
@pytest.mark.parametrize("seen", [1, 3, 5])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_projector_kills_preserved_keys_and_leaves_the_complement(h: int, seen: int, relative: bool, seed: int) -> None:
    basis = subspace(h, seen, seed)
    keys = planted_keys(basis, 40, seed)
    projector = null_space(moment(keys)[None], COUNTS, 1e-8, relative).projectors[0]
    p = matrix(projector, h)
    torch.testing.assert_close(p @ p, p, rtol=0, atol=1e-10)
    torch.testing.assert_close(p, p.T, rtol=0, atol=1e-12)
    assert (p @ keys.T).abs().max() < 1e-7
    untouched = subspace(h, h, seed)[:, seen:]
    torch.testing.assert_close(p @ untouched, untouched, rtol=0, atol=1e-7)
    assert projector.rank == h - seen == round(float(p.trace()))


@pytest.mark.parametrize(("seen", "complement"), [(0, True), (1, True), (2, True), (3, False), (5, False), (6, False)])
def test_the_cheaper_side_is_kept(seen: int, complement: bool) -> None:
    h = 6
    basis = subspace(h, h)
    c = basis @ torch.diag(torch.tensor([2.0] * seen + [0.0] * (h - seen)).double()) @ basis.T
    projector = null_space(c[None], COUNTS, 1e-6).projectors[0]
    assert projector.complement is complement
    assert projector.basis.shape == (h, min(seen, h - seen))
    assert projector.rank == h - seen
    wanted = torch.eye(h, dtype=torch.float64) - basis[:, :seen] @ basis[:, :seen].T
    torch.testing.assert_close(matrix(projector, h), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seen", [0, 1, 4, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_both_sides_give_equal_results(seen: int, dtype: torch.dtype) -> None:
    basis = subspace(6, 6, seed=2)
    removed = ExpertProjector(basis[:, :seen], complement=True)
    kept = ExpertProjector(basis[:, seen:], complement=False)
    x = torch.randn(6, 3, dtype=dtype)
    assert removed(x).dtype == kept(x).dtype == dtype
    torch.testing.assert_close(removed(x), kept(x), rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)
    assert removed.rank == kept.rank == 6 - seen


def test_absolute_threshold_includes_its_own_value_and_depends_on_scale() -> None:
    c = torch.diag(torch.tensor([0.0, 0.01, 0.02, 0.021, 5.0], dtype=torch.float64))
    assert null_space(c[None], COUNTS, 0.02).ranks == [3]
    assert null_space(c[None], COUNTS, 0.0).ranks == [1]
    assert null_space(100 * c[None], COUNTS, 0.02).ranks == [1]
    assert null_space(c[None] / 1000, COUNTS, 0.02).ranks == [5]


def test_relative_threshold_is_a_share_of_each_experts_largest_eigenvalue() -> None:
    c = torch.diag(torch.tensor([0.0, 0.01, 0.02, 1.0, 5.0], dtype=torch.float64))
    moments = torch.stack([c, 1000 * c, c / 1000, torch.diag(torch.tensor([1.0, 1, 1, 1, 5]).double())])
    counts = torch.full((4,), 500)
    assert null_space(moments, counts, 0.02, relative=True).ranks == [3, 3, 3, 0]
    assert null_space(moments, counts, 0.2, relative=True).ranks == [4, 4, 4, 4]
    assert null_space(moments, counts, 0.02, relative=False).ranks == [3, 1, 5, 0]


def test_each_expert_has_its_own_projector() -> None:
    bases = [subspace(5, r, seed=r) for r in (1, 2, 4)]
    space = null_space(torch.stack([b @ b.T for b in bases]), torch.full((3,), 500), 1e-6)
    assert space.ranks == [4, 3, 1]
    x = torch.randn(5, 2, dtype=torch.float64)
    for j, b in enumerate(bases):
        torch.testing.assert_close(space.apply(j, x), x - b @ (b.T @ x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eigh_runs_in_float64_whatever_the_moments(dtype: torch.dtype) -> None:
    basis = subspace(6, 3)
    c = (basis @ basis.T).to(dtype)
    projector = null_space(c[None], COUNTS, 0.05).projectors[0]
    assert projector.basis.dtype == torch.float64
    p = matrix(projector, 6)
    torch.testing.assert_close(p @ p, p, rtol=0, atol=1e-12)


# Expert 0: many tokens. 1: few. 2: none.
THIN_COUNTS = torch.tensor([300, 4, 0])


def thin_moments() -> tuple[Tensor, Tensor, Tensor]:
    first, second = subspace(6, 2, seed=7), subspace(6, 1, seed=8)
    moments = torch.stack([first @ first.T, 3 * second @ second.T, torch.zeros(6, 6).double()])
    return moments, first, second


def remove(*bases: Tensor) -> Tensor:
    q = torch.linalg.qr(torch.cat(bases, dim=1)).Q
    return torch.eye(6, dtype=torch.float64) - q @ q.T


@pytest.mark.parametrize("choice", LOW_COVERAGE)
def test_what_becomes_of_thin_experts_is_the_callers_choice(choice: str) -> None:
    moments, first, second = thin_moments()
    space = null_space(moments, THIN_COUNTS, 1e-6, min_count=6, low_coverage=choice)
    eye = torch.eye(6, dtype=torch.float64)
    thin = {
        "keep": [remove(second), eye],
        "identity": [eye, eye],
        "frozen": [0 * eye, 0 * eye],
        "pooled": [remove(first, second)] * 2,
    }[choice]
    for j, wanted in enumerate([remove(first), *thin]):
        torch.testing.assert_close(matrix(space.projectors[j], 6), wanted, rtol=0, atol=1e-9)
        assert space.ranks[j] == round(float(wanted.trace()))


@pytest.mark.parametrize("choice", LOW_COVERAGE)
def test_without_a_minimum_every_moment_is_its_own(choice: str) -> None:
    moments, _, second = thin_moments()
    space = null_space(moments, THIN_COUNTS, 1e-6, min_count=0, low_coverage=choice)
    torch.testing.assert_close(matrix(space.projectors[1], 6), remove(second), rtol=0, atol=1e-9)
    assert space.ranks == [4, 5, 6]


def test_resolve_coverage_per_expert() -> None:
    moments, _, _ = thin_moments()
    kept = resolve_coverage(moments.float(), THIN_COUNTS, 6, "keep")
    assert all(isinstance(m, Tensor) and m.dtype == torch.float64 for m in kept)
    assert resolve_coverage(moments, THIN_COUNTS, 6, "identity")[1:] == ["identity", "identity"]
    assert resolve_coverage(moments, THIN_COUNTS, 6, "frozen")[1:] == ["frozen", "frozen"]
    pooled = resolve_coverage(moments, THIN_COUNTS, 6, "pooled")
    torch.testing.assert_close(pooled[0], moments[0])
    torch.testing.assert_close(pooled[2], (300 * moments[0] + 4 * moments[1]) / 304)
    # The minimum itself is enough.
    assert isinstance(resolve_coverage(moments, THIN_COUNTS, 4, "frozen")[1], Tensor)


def test_pooled_moment_is_that_of_all_keys_together() -> None:
    parts = [torch.randn(n, 4, dtype=torch.float64) for n in (7, 1, 30)]
    moments = torch.stack([*(moment(p) for p in parts), torch.full((4, 4), 9.0).double()])
    counts = torch.tensor([7, 1, 30, 0])
    torch.testing.assert_close(pooled_moment(moments, counts), moment(torch.cat(parts)), rtol=1e-12, atol=1e-12)
    assert pooled_moment(moments.float(), counts).dtype == torch.float64


def test_nothing_to_pool_is_an_error() -> None:
    with pytest.raises(NumericalError, match="no statistics to pool"):
        pooled_moment(torch.zeros(2, 3, 3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(NumericalError, match="no statistics to pool"):
        null_space(torch.zeros(2, 3, 3), torch.zeros(2, dtype=torch.int64), 0.02, min_count=1, low_coverage="pooled")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("choice", LOW_COVERAGE)
def test_moments_that_are_not_finite(bad: float, choice: str) -> None:
    moments = torch.stack([torch.eye(3), torch.eye(3)])
    moments[1, 0, 2] = bad
    with pytest.raises(NumericalError, match="NaN or infinity"):
        null_space(moments, torch.tensor([9, 9]), 0.02, min_count=20, low_coverage=choice)


def test_a_failed_eigendecomposition_is_an_error_and_not_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.raises(NumericalError, match="expert 0's moment failed"):
        null_space(torch.eye(3)[None], COUNTS, 0.02)


@pytest.mark.parametrize(
    ("threshold", "relative"), [(-0.01, False), (-1e-9, True), (1.01, True), (float("nan"), False)]
)
def test_thresholds_out_of_range(threshold: float, relative: bool) -> None:
    with pytest.raises(HyperParamsError, match="nullspace_threshold"):
        null_space(torch.eye(3)[None], COUNTS, threshold, relative)


def test_an_absolute_threshold_may_exceed_one() -> None:
    assert null_space(torch.eye(3)[None], COUNTS, 1.5).ranks == [3]


def test_unknown_low_coverage() -> None:
    with pytest.raises(HyperParamsError, match="keep, identity, pooled, frozen; found 'drop'"):
        null_space(torch.eye(3)[None], COUNTS, 0.02, low_coverage="drop")


# ---------------------------------------------------------------- by energy or by rank


def spectrum(*values: float, seed: int = 0) -> Tensor:
    """A moment with these eigenvalues."""
    q = subspace(len(values), len(values), seed)
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5])
@pytest.mark.parametrize(
    ("energy", "ranks"), [(0.5, [5, 3]), (0.79, [4, 1]), (0.81, [3, 1]), (0.95, [2, 0]), (1.0, [2, 0]), (1e-9, [5, 5])]
)
def test_energy_protects_the_fewest_directions_that_hold_it(
    energy: float, ranks: list[int], scale: float, dtype: torch.dtype
) -> None:
    """Each expert for itself, whatever the scale of its keys."""
    moments = torch.stack([spectrum(6, 2, 1, 1, 0, 0), 100 * spectrum(1, 1, 1, 1, 1, 1 - 4e-3, seed=1)]) * scale
    if energy == 1 and dtype == torch.float32:
        pytest.skip("rounding of the moments has energy, too")
    found = null_space(moments.to(dtype), COUNTS.repeat(2), None, energy=energy)
    assert found.ranks == ranks
    for projector, own in zip(found.projectors, moments, strict=True):
        p = matrix(projector, 6)
        kept = torch.eye(6, dtype=torch.float64) - p
        assert float((kept @ own).trace() / own.trace()) >= energy - 1e-6  # what is protected holds the energy
        values = torch.linalg.eigvalsh(own).flip(0)
        fewer = 6 - projector.rank - 1
        assert float(values[:fewer].sum() / values.sum()) < energy + 1e-6  # and no fewer directions do


@pytest.mark.parametrize(("rank", "dimension"), [(1, 1), (4, 4), (6, 6), (0.5, 3), (1.0, 6), (0.01, 1)])
def test_rank_is_the_dimension_of_every_null_space(rank: int | float, dimension: int) -> None:
    moments = torch.stack([spectrum(6, 5, 4, 3, 2, 1), spectrum(1e-3, 1e-4, 1e-5, 0, 0, 0, seed=2)])
    found = null_space(moments, COUNTS.repeat(2), None, rank=rank)
    assert found.ranks == [dimension, dimension]
    vectors = torch.linalg.eigh(moments[0]).eigenvectors[:, :dimension]
    torch.testing.assert_close(matrix(found.projectors[0], 6), vectors @ vectors.T)


def test_nothing_seen_leaves_nothing_to_protect() -> None:
    assert null_space(torch.zeros(1, 4, 4), COUNTS, None, energy=0.99).ranks == [4]


@pytest.mark.parametrize("changes", [{"energy": 0.5}, {"rank": 2}], ids=str)
def test_thin_experts_are_still_the_callers_choice(changes: dict[str, float]) -> None:
    moments, counts = torch.stack([spectrum(4, 3, 2, 1), spectrum(1, 1, 1, 1)]), torch.tensor([2, 500])
    frozen = null_space(moments, counts, None, min_count=10, low_coverage="frozen", **changes)
    free = null_space(moments, counts, None, min_count=10, low_coverage="identity", **changes)
    assert (frozen.ranks[0], free.ranks[0]) == (0, 4)
    assert frozen.ranks[1] == free.ranks[1] == 2


@pytest.mark.parametrize(
    ("threshold", "changes", "message"),
    [
        (None, {}, "Give one of"), (0.1, {"energy": 0.9}, "Give one of"), (None, {"energy": 1, "rank": 1}, "Give one"),
        (None, {"energy": 0.0}, "energy must lie in"), (None, {"energy": 1.1}, "energy must lie in"),
        (None, {"energy": float("nan")}, "energy must lie in"), (None, {"rank": 0}, "nullspace_rank must lie in 1..4"),
        (None, {"rank": 5}, "nullspace_rank must lie in 1..4"), (None, {"rank": 1.5}, "as a fraction"),
    ],
    ids=str,
)  # fmt: skip
def test_energies_and_ranks_out_of_range(threshold: float | None, changes: dict[str, float], message: str) -> None:
    with pytest.raises(HyperParamsError, match=message):
        null_space(spectrum(4, 3, 2, 1)[None], COUNTS, threshold, **changes)
