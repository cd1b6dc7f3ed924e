"""Tucker bases: planted tensors, dense truncations by SVD of the unfoldings, whitening and its re-colouring."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from easyedit_moe.algebra.ranks import resolve_rank
from easyedit_moe.algebra.tucker import WHITENING, TuckerBasis, tucker_basis, whitening_factor
from easyedit_moe.errors import HyperParamsError, NumericalError

E, D, H = 5, 6, 7
EPS = 0.05


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def second_moment(size: int, spread: float, seed: int) -> Tensor:
    """Positive semi-definite with eigenvalues from ``10^-spread`` to ``10^spread``."""
    q = torch.linalg.qr(normal(size, size, seed=seed)).Q
    return q @ torch.diag(torch.logspace(-spread, spread, size, dtype=torch.float64)) @ q.T


SIGMA_IN, SIGMA_OUT = second_moment(H, 1.5, 11), second_moment(D, 1.0, 12)


def unfold(tensor: Tensor, mode: int) -> Tensor:
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def svd_factors(tensor: Tensor, ranks: tuple[int, int, int], sweeps: int = 0) -> list[Tensor]:
    """HOSVD, then HOOI, from singular vectors of unfoldings."""
    leading = [torch.linalg.svd(unfold(tensor, m)).U[:, :r] for m, r in enumerate(ranks)]
    for _ in range(sweeps):
        e, o, i = leading
        leading[0] = torch.linalg.svd(unfold(torch.einsum("edh,do,hi->eoi", tensor, o, i), 0)).U[:, : ranks[0]]
        e = leading[0]
        leading[1] = torch.linalg.svd(unfold(torch.einsum("edh,ea,hi->adi", tensor, e, i), 1)).U[:, : ranks[1]]
        o = leading[1]
        leading[2] = torch.linalg.svd(unfold(torch.einsum("edh,ea,do->aoh", tensor, e, o), 2)).U[:, : ranks[2]]
    return leading


def truncate(tensor: Tensor, factors: list[Tensor]) -> Tensor:
    """``tensor`` multiplied by ``U U^T`` in each mode."""
    e, o, i = (f @ f.T for f in factors)
    return torch.einsum("edh,ae,bd,ch->abc", tensor, e, o, i)


def dense_error(tensor: Tensor, factors: list[Tensor]) -> float:
    return float((tensor - truncate(tensor, factors)).norm() / tensor.norm())


def colours(whitening: str) -> tuple[Tensor, Tensor]:
    """``S_in``, ``S_out`` of a mode; the identity where it does not whiten."""
    s_in, s_out = torch.eye(H, dtype=torch.float64), torch.eye(D, dtype=torch.float64)
    if whitening in ("in", "both"):
        s_in = torch.linalg.cholesky(SIGMA_IN + EPS * torch.eye(H, dtype=torch.float64))
    if whitening in ("out", "both"):
        s_out = torch.linalg.cholesky(SIGMA_OUT + EPS * torch.eye(D, dtype=torch.float64))
    return s_in, s_out


def whiten(weights: Tensor, whitening: str) -> Tensor:
    s_in, s_out = colours(whitening)
    return torch.linalg.inv(s_out) @ weights @ s_in


def reconstruct(weights: Tensor, basis: TuckerBasis, whitening: str) -> Tensor:
    """``U_out (sum_a U_e[j,a] G_a) U_in^T`` with the core of the whitened tensor, from the re-coloured factors."""
    s_in, s_out = colours(whitening)
    white_out, white_in = torch.linalg.inv(s_out) @ basis.u_out, s_in.T @ basis.u_in
    core = torch.einsum("edh,ea,do,hi->aoi", whiten(weights, whitening), basis.u_expert, white_out, white_in)
    return torch.einsum("aoi,ea,do,hi->edh", core, basis.u_expert, basis.u_out, basis.u_in)


def basis_of(weights: Tensor, ranks: tuple, whitening: str = "none", sweeps: int = 0) -> TuckerBasis:
    return tucker_basis(weights, *ranks, sweeps, whitening, SIGMA_IN, SIGMA_OUT, EPS)


@pytest.mark.parametrize("ranks", [(2, 3, 4), (1, 1, 1), (5, 2, 7), (3, 6, 2)])
@pytest.mark.parametrize("sweeps", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_planted_tensor_is_recovered(ranks: tuple[int, int, int], sweeps: int, dtype: torch.dtype) -> None:
    factors = [normal(n, r, seed=i) for i, (n, r) in enumerate(zip((E, D, H), ranks, strict=True))]
    weights = torch.einsum("aoi,ea,do,hi->edh", normal(*ranks, seed=9), *factors).to(dtype)
    basis = tucker_basis(weights, *ranks, hooi_sweeps=sweeps)
    exact = dtype == torch.float64
    assert basis.relative_error < (1e-6 if exact else 2e-3)
    found = reconstruct(weights.double(), basis, "none")
    torch.testing.assert_close(found, weights.double(), rtol=0, atol=1e-10 if exact else 1e-4 * float(weights.norm()))
    assert basis.u_expert.shape == (E, ranks[0])
    assert basis.u_out.shape == (D, ranks[1])
    assert basis.u_in.shape == (H, ranks[2])


def test_one_rank_too_few_loses_something() -> None:
    weights = torch.einsum("aoi,ea,do,hi->edh", normal(2, 3, 4), *(normal(n, r) for n, r in ((E, 2), (D, 3), (H, 4))))
    for ranks in ((1, 3, 4), (2, 2, 4), (2, 3, 3)):
        assert tucker_basis(weights, *ranks).relative_error > 1e-2


@pytest.mark.parametrize("whitening", WHITENING)
@pytest.mark.parametrize("sweeps", [0, 1, 3])
@pytest.mark.parametrize("ranks", [(2, 3, 4), (4, 2, 2), (5, 6, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_factors_and_error_are_those_of_the_dense_truncation(
    whitening: str, sweeps: int, ranks: tuple[int, int, int], seed: int
) -> None:
    weights = normal(E, D, H, seed=seed)
    basis = basis_of(weights, ranks, whitening, sweeps)
    white = whiten(weights, whitening)
    reference = svd_factors(white, ranks, sweeps)
    assert basis.relative_error == pytest.approx(dense_error(white, reference), rel=1e-8)
    s_in, s_out = colours(whitening)
    own = [basis.u_expert, torch.linalg.inv(s_out) @ basis.u_out, s_in.T @ basis.u_in]
    for factor, wanted in zip(own, reference, strict=True):
        torch.testing.assert_close(factor @ factor.T, wanted @ wanted.T, rtol=0, atol=1e-7)
        torch.testing.assert_close(factor.T @ factor, torch.eye(factor.shape[1]).double(), rtol=0, atol=1e-9)
    # Re-coloured, the truncation of the whitened tensor is the truncation of the weights.
    wanted = s_out @ truncate(white, reference) @ torch.linalg.inv(s_in)
    torch.testing.assert_close(reconstruct(weights, basis, whitening), wanted, rtol=0, atol=1e-7)


def test_factors_are_ordered_by_energy() -> None:
    weights = normal(E, D, H)
    basis = tucker_basis(weights, 3, 4, 5)
    for mode, factor in enumerate((basis.u_expert, basis.u_out, basis.u_in)):
        energy = (factor.T @ unfold(weights, mode)).norm(dim=1)
        assert torch.equal(energy, energy.sort(descending=True).values)


@pytest.mark.parametrize("whitening", ["none", "both"])
@pytest.mark.parametrize("seed", range(6))
def test_hooi_never_increases_the_error(whitening: str, seed: int) -> None:
    weights = normal(E, D, H, seed=seed)
    errors = [basis_of(weights, (2, 2, 2), whitening, sweeps).relative_error for sweeps in (0, 1, 2, 5, 20)]
    assert all(b <= a + 1e-12 for a, b in pairwise(errors))
    assert errors[-1] < errors[0] - 1e-4


@pytest.mark.parametrize("whitening", WHITENING)
@pytest.mark.parametrize("sweeps", [0, 1])
def test_full_ranks_reconstruct_the_weights(whitening: str, sweeps: int) -> None:
    weights = normal(E, D, H, seed=3)
    basis = basis_of(weights, (1.0, 1.0, 1.0), whitening, sweeps)
    assert basis.relative_error < 1e-6
    torch.testing.assert_close(reconstruct(weights, basis, whitening), weights, rtol=0, atol=1e-9)


@pytest.mark.parametrize("whitening", WHITENING)
def test_only_whitened_sides_lose_orthonormality(whitening: str) -> None:
    basis = basis_of(normal(E, D, H), (3, 4, 5), whitening)

    def orthonormal(factor: Tensor) -> bool:
        return bool(torch.allclose(factor.T @ factor, torch.eye(factor.shape[1]).double(), atol=1e-9))

    assert orthonormal(basis.u_expert)
    assert orthonormal(basis.u_out) is (whitening in ("none", "in"))
    assert orthonormal(basis.u_in) is (whitening in ("none", "out"))


@pytest.mark.parametrize("size", [1, 4, 9])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_whitening_factor_is_a_lower_square_root(size: int, eps: float, dtype: torch.dtype) -> None:
    keys = normal(3, size)  # rank deficient for sizes above 3: eps makes it definite
    sigma = (keys.T @ keys / 3).to(dtype)
    s = whitening_factor(sigma, eps)
    assert s.dtype == torch.float64
    assert torch.equal(s, s.tril())
    torch.testing.assert_close(s @ s.T, sigma.double() + eps * torch.eye(size).double(), rtol=1e-10, atol=1e-12)


def expected_output_error(weights: Tensor, approximation: Tensor, sigma: Tensor) -> float:
    """``sum_j E ||(W_j - What_j) x||^2`` for x of second moment ``sigma``."""
    lost = weights - approximation
    return float(torch.einsum("edh,hk,edk->", lost, sigma, lost))


@pytest.mark.parametrize("ranks", [(5, 6, 3), (5, 6, 5), (3, 4, 3), (2, 3, 2)])
@pytest.mark.parametrize("seed", range(4))
def test_input_whitening_lowers_the_expected_output_error(ranks: tuple[int, int, int], seed: int) -> None:
    weights = normal(E, D, H, seed=seed)
    keys = normal(200, H, seed=seed + 50) @ torch.linalg.cholesky(SIGMA_IN).T
    sigma = keys.T @ keys / len(keys)
    plain = tucker_basis(weights, *ranks)
    white = tucker_basis(weights, *ranks, whitening="in", sigma_in=sigma, whitening_eps=1e-9)
    s = torch.linalg.cholesky(sigma + 1e-9 * torch.eye(H, dtype=torch.float64))
    core = torch.einsum("edh,ea,do,hi->aoi", weights @ s, white.u_expert, white.u_out, s.T @ white.u_in)
    approximation = torch.einsum("aoi,ea,do,hi->edh", core, white.u_expert, white.u_out, white.u_in)
    factors = [plain.u_expert, plain.u_out, plain.u_in]
    whitened_error = expected_output_error(weights, approximation, sigma)
    assert whitened_error < 0.95 * expected_output_error(weights, truncate(weights, factors), sigma)
    # The reported error is exactly that of the outputs.
    total = expected_output_error(weights, torch.zeros_like(weights), sigma)
    assert white.relative_error == pytest.approx((whitened_error / total) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("whitening", WHITENING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_weights_give_nearly_the_same_basis(whitening: str, dtype: torch.dtype) -> None:
    weights = normal(E, D, H, seed=4).to(dtype)
    low = basis_of(weights, (5, 6, 3), whitening)
    high = basis_of(weights.double(), (5, 6, 3), whitening)
    assert {f.dtype for f in (low.u_expert, low.u_out, low.u_in)} == {torch.float64}
    assert low.relative_error == pytest.approx(high.relative_error, rel=1e-4)
    torch.testing.assert_close(low.u_in @ low.u_in.T, high.u_in @ high.u_in.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("rank", "wanted"), [(1, 1), (10, 10), (4, 4), (1.0, 10), (0.5, 5), (0.26, 3), (1e-9, 1)])
def test_ranks_as_ints_and_fractions(rank: float, wanted: int) -> None:
    assert resolve_rank(rank, 10, "rank_in") == wanted


def test_fractions_are_of_each_modes_own_size() -> None:
    basis = tucker_basis(normal(E, D, H), 0.4, 0.5, 0.43)
    assert (basis.u_expert.shape[1], basis.u_out.shape[1], basis.u_in.shape[1]) == (2, 3, 3)


@pytest.mark.parametrize("rank", [0, -1, 11, 0.0, -0.5, 1.5, float("nan"), True, False, "3", None])
def test_ranks_out_of_range(rank: object) -> None:
    with pytest.raises(HyperParamsError, match="rank_out"):
        resolve_rank(rank, 10, "rank_out")


@pytest.mark.parametrize(("mode", "name"), enumerate(["rank_expert", "rank_out", "rank_in"]))
@pytest.mark.parametrize("rank", [0, 8, True, 1.2])
def test_the_bad_rank_is_named(mode: int, name: str, rank: float) -> None:
    ranks: list[float] = [2, 2, 2]
    ranks[mode] = rank
    with pytest.raises(HyperParamsError, match=name):
        tucker_basis(normal(E, D, H), *ranks)


def test_unknown_whitening() -> None:
    with pytest.raises(HyperParamsError, match="none, in, out, both; found 'inn'"):
        tucker_basis(normal(E, D, H), 2, 2, 2, whitening="inn")


def test_negative_sweeps() -> None:
    with pytest.raises(HyperParamsError, match="hooi_sweeps"):
        tucker_basis(normal(E, D, H), 2, 2, 2, hooi_sweeps=-1)


@pytest.mark.parametrize("eps", [0.0, -1e-5])
@pytest.mark.parametrize("whitening", ["in", "out"])
def test_eps_must_be_positive(eps: float, whitening: str) -> None:
    with pytest.raises(HyperParamsError, match="whitening_eps"):
        tucker_basis(normal(E, D, H), 2, 2, 2, 0, whitening, SIGMA_IN, SIGMA_OUT, eps)


@pytest.mark.parametrize(
    ("whitening", "given", "missing"),
    [("in", "out", "sigma_in"), ("out", "in", "sigma_out"), ("both", "in", "sigma_out"), ("both", "out", "sigma_in")],
)
def test_whitening_without_its_moment(whitening: str, given: str, missing: str) -> None:
    sigma = {"in": {"sigma_in": SIGMA_IN}, "out": {"sigma_out": SIGMA_OUT}}[given]
    with pytest.raises(HyperParamsError, match=f"needs {missing}"):
        tucker_basis(normal(E, D, H), 2, 2, 2, whitening=whitening, **sigma)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad: float) -> None:
    weights = normal(E, D, H)
    weights[1, 2, 3] = bad
    with pytest.raises(NumericalError, match="NaN or infinity"):
        tucker_basis(weights, 2, 2, 2)


def test_moments_that_are_not_finite_or_not_definite() -> None:
    broken = SIGMA_IN.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="NaN or infinity"):
        whitening_factor(broken, EPS)
    with pytest.raises(NumericalError, match="not positive definite"):
        whitening_factor(-torch.eye(3), 1e-5)


def test_a_failed_eigendecomposition_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.raises(NumericalError, match="Eigendecomposition"):
        tucker_basis(normal(E, D, H), 2, 2, 2)


def test_zero_weights_have_no_error() -> None:
    assert tucker_basis(torch.zeros(3, 4, 5), 1, 1, 1).relative_error == 0.0


# ---------------------------------------------------------------- chunks and the range finder


@pytest.mark.parametrize("whitening", WHITENING)
@pytest.mark.parametrize("sweeps", [0, 2])
@pytest.mark.parametrize("chunk", [1, 2 * D * H, 10**6])
def test_chunks_and_lists_of_matrices_give_the_same_basis(whitening: str, sweeps: int, chunk: int) -> None:
    weights = normal(E, D, H)
    wanted = basis_of(weights, (3, 4, 2), whitening, sweeps)
    # Transposed storage, one matrix per expert.
    matrices = [w.T.contiguous().T for w in weights]
    found = tucker_basis(
        matrices, 3, 4, 2, sweeps, whitening, SIGMA_IN, SIGMA_OUT, EPS, chunk_numbers=chunk, method="gram"
    )
    for name in ("u_expert", "u_out", "u_in"):
        a, b = getattr(found, name), getattr(wanted, name)
        torch.testing.assert_close(a.abs(), b.abs(), rtol=1e-8, atol=1e-10)
    assert found.relative_error == pytest.approx(wanted.relative_error, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_weights_are_left_alone(dtype: torch.dtype) -> None:
    weights = normal(E, D, H).to(dtype)
    before = weights.clone()
    tucker_basis(weights, 2, 2, 2, 1, "both", SIGMA_IN, SIGMA_OUT, EPS)
    assert torch.equal(weights, before)


def spectrum(decay: float, size: int = 150) -> Tensor:
    """``[3, size, size]`` whose modes 1 and 2 have singular values ``k^-decay``; flat for 0."""
    values = torch.arange(1, size + 1, dtype=torch.float64) ** -decay
    sides = [torch.linalg.qr(normal(size, size, seed=i)).Q for i in (1, 2)]
    base = sides[0] @ torch.diag(values) @ sides[1].T
    return torch.stack([base, 0.5 * base, normal(size, size, seed=3) * 1e-3 * values[0]])


@pytest.mark.parametrize(("decay", "excess"), [(0.0, 1.05), (0.5, 1.005), (1.0, 1.005), (2.0, 1.005)])
@pytest.mark.parametrize("whitening", ["none", "in"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_range_finder_keeps_to_its_stated_error(
    decay: float, excess: float, whitening: str, dtype: torch.dtype
) -> None:
    weights = spectrum(decay).to(dtype)
    sigma = second_moment(150, 0.3, 4)
    options = {"whitening": whitening, "sigma_in": sigma, "whitening_eps": EPS}
    best = tucker_basis(weights, 3, 8, 9, method="gram", **options)
    found = tucker_basis(weights, 3, 8, 9, method="randomised", **options)
    assert found.relative_error <= excess * best.relative_error
    again = tucker_basis(weights, 3, 8, 9, **options)
    assert torch.equal(again.u_out, found.u_out), "auto takes the range finder for ranks this low, with a fixed seed"
    white = found.u_in if whitening == "none" else whitening_factor(sigma, EPS).T @ found.u_in
    for u in (found.u_out, white):
        torch.testing.assert_close(u.T @ u, torch.eye(u.shape[1]).double(), rtol=0, atol=1e-6)


def test_a_planted_tensor_is_found_by_the_range_finder() -> None:
    factors = [normal(n, r, seed=i) for i, (n, r) in enumerate(((5, 2), (120, 3), (130, 4)))]
    weights = torch.einsum("aoi,ea,do,hi->edh", normal(2, 3, 4, seed=9), *factors)
    basis = tucker_basis(weights, 2, 3, 4, method="randomised")
    assert basis.relative_error < 1e-6
    torch.testing.assert_close(basis.u_out @ (basis.u_out.T @ factors[1]), factors[1], rtol=0, atol=1e-8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_range_finder_refuses_weights_that_are_not_finite(bad: float) -> None:
    weights = normal(E, D, H)
    weights[1, 2, 3] = bad
    with pytest.raises(NumericalError, match="NaN or infinity"):
        tucker_basis(weights, 2, 2, 2, method="randomised")


def test_unknown_method() -> None:
    with pytest.raises(HyperParamsError, match="auto, gram, randomised; found 'svd'"):
        tucker_basis(normal(E, D, H), 2, 2, 2, method="svd")


@pytest.mark.parametrize("whitening", ["none", "out"])
def test_coordinates_are_those_of_least_squares(whitening: str) -> None:
    basis, x = basis_of(normal(E, D, H), (2, 3, 2), whitening), normal(D, 4, seed=5)
    wanted = torch.linalg.lstsq(basis.u_out, x).solution
    torch.testing.assert_close(basis.coordinates(x), wanted, rtol=1e-8, atol=1e-10)


# ---------------------------------------------------------------- ranks by energy


def fewest(values: Tensor, share: float) -> int:
    """By counting up."""
    total, held = float(values.sum()), 0.0
    for count, value in enumerate(values.tolist(), 1):
        held += value
        if held >= share * total * (1 - 1e-12):
            return count
    return len(values)


@pytest.mark.parametrize("whitening", WHITENING)
@pytest.mark.parametrize("energy", [(0.9, 0.9, 0.9), (0.5, 0.99, 0.7), (1.0, 1.0, 1.0), (1e-6, 0.6, 1.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_ranks_by_energy_are_those_of_each_unfolding(
    energy: tuple[float, float, float], whitening: str, dtype: torch.dtype
) -> None:
    """Of the whitened tensor, per mode, and the basis is that of these ranks."""
    weights = normal(E, D, H, seed=4).to(dtype) * torch.logspace(0, -2, H).to(dtype)
    white = whiten(weights.double(), whitening)
    ranks = tuple(fewest(torch.linalg.svdvals(unfold(white, mode)) ** 2, share) for mode, share in enumerate(energy))
    options = {"whitening": whitening, "sigma_in": SIGMA_IN, "sigma_out": SIGMA_OUT, "whitening_eps": EPS}
    found = tucker_basis(weights, 1, 1, 1, energy=energy, **options)
    assert (found.u_expert.shape[1], found.u_out.shape[1], found.u_in.shape[1]) == ranks
    wanted = tucker_basis(weights, *ranks, **options)
    for name in ("u_expert", "u_out", "u_in"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))
    assert found.relative_error == pytest.approx(wanted.relative_error, rel=1e-9, abs=1e-9)
    assert found.relative_error**2 <= sum(1 - share for share in energy) + 1e-6


def test_energy_finds_the_ranks_of_a_planted_tensor() -> None:
    factors = [normal(n, r, seed=i) for i, (n, r) in enumerate(((16, 2), (24, 5), (40, 3)))]
    weights = torch.einsum("aoi,ea,do,hi->edh", normal(2, 5, 3, seed=9), *factors)
    found = tucker_basis(weights + 1e-6 * normal(16, 24, 40, seed=8), 1, 1, 1, energy=(1 - 1e-9,) * 3)
    assert (found.u_expert.shape[1], found.u_out.shape[1], found.u_in.shape[1]) == (2, 5, 3)
    assert found.relative_error < 1e-4
    again = tucker_basis(weights, 1, 1, 1, energy=(1 - 1e-9,) * 3, hooi_sweeps=2)
    assert again.u_in.shape == (40, 3)


@pytest.mark.parametrize("energy", [(0.0, 0.5, 0.5), (0.5, 1.1, 0.5), (0.5, 0.5), (0.5, 0.5, float("nan"))], ids=str)
def test_energies_out_of_range(energy: tuple[float, ...]) -> None:
    with pytest.raises(HyperParamsError, match=r"three shares in \(0, 1\]"):
        tucker_basis(normal(E, D, H), 1, 1, 1, energy=energy)
