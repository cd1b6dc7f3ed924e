"""Tucker bases of a stack of expert matrices: HOSVD, optional HOOI, optional whitening (pure, torch only)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from easyedit_moe.errors import HyperParamsError, NumericalError

WHITENING = ("none", "in", "out", "both")


@dataclass(frozen=True)
class TuckerBasis:
    """Factors of ``W_j ~ U_out (sum_a U_expert[j,a] G_a) U_in^T``.

    Attributes:
        u_expert: ``[E, re]``, orthonormal columns.
        u_out: ``[d, ro]``; orthonormal unless whitened on the output side.
        u_in: ``[h, ri]``; orthonormal unless whitened on the input side.
        relative_error: ``||Wt - its projection|| / ||Wt||`` of the (whitened) tensor that was decomposed.
    """

    u_expert: Tensor
    u_out: Tensor
    u_in: Tensor
    relative_error: float

    @cached_property
    def _out_qr(self) -> tuple[Tensor, Tensor | None]:
        """``(Q, R)`` of U_out; ``(U_out, None)`` where its columns are orthonormal already."""
        u = self.u_out.to(torch.float64)
        gram = u.T @ u
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return (u, None) if torch.allclose(gram, eye, rtol=0, atol=1e-10) else tuple(torch.linalg.qr(u))

    def coordinates(self, x: Tensor) -> Tensor:
        """``U_out^+ x [ro, n]`` for ``x [d, n]`` in float64: coordinates of its part in the span of U_out."""
        q, r = self._out_qr
        return q.T @ x if r is None else torch.linalg.solve_triangular(r, q.T @ x, upper=True)


def resolve_rank(rank: int | float, size: int, name: str) -> int:
    """A rank given as an int (1..size) or as a fraction in (0, 1] of ``size``.

    Raises:
        HyperParamsError: out of range.
    """
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise HyperParamsError(f"{name} must be an int or a fraction; found {rank!r}.")
    if isinstance(rank, float):
        if not 0 < rank <= 1:
            raise HyperParamsError(f"{name} as a fraction must lie in (0, 1]; found {rank}.")
        return max(1, round(rank * size))
    if not 1 <= rank <= size:
        raise HyperParamsError(f"{name} must lie in 1..{size}, the size of that mode; found {rank}.")
    return rank


def whitening_factor(sigma: Tensor, eps: float) -> Tensor:
    """Lower Cholesky factor S with ``S S^T = sigma + eps I``, float64.

    Raises:
        HyperParamsError: ``eps`` <= 0. NumericalError: sigma not finite, or not positive definite even with eps.
    """
    if eps <= 0:
        raise HyperParamsError(f"whitening_eps must be > 0; found {eps}.")
    sigma = sigma.to(torch.float64)
    if not torch.isfinite(sigma).all():
        raise NumericalError("The second moment for whitening holds NaN or infinity. Collect statistics anew.")
    factor, failed = torch.linalg.cholesky_ex(
        sigma + eps * torch.eye(len(sigma), dtype=sigma.dtype, device=sigma.device)
    )
    if failed:
        raise NumericalError(f"The second moment for whitening is not positive definite at whitening_eps {eps}.")
    return factor


def _leading(gram: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the ``rank`` largest eigenvalues, largest first."""
    try:
        return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1).contiguous()
    except torch.linalg.LinAlgError as error:
        raise NumericalError(f"Eigendecomposition of a mode's Gram matrix failed: {error}") from error


def _mode_gram(tensor: Tensor, mode: int) -> Tensor:
    """``[n, n]`` float64 Gram matrix of the mode-``mode`` unfolding, one expert at a time for modes 1 and 2."""
    if mode == 0:
        flat = tensor.reshape(len(tensor), -1)
        return (flat @ flat.T).to(torch.float64)
    gram = torch.zeros(tensor.shape[mode], tensor.shape[mode], dtype=torch.float64, device=tensor.device)
    for matrix in tensor:
        gram += (matrix @ matrix.T if mode == 1 else matrix.T @ matrix).to(torch.float64)
    return gram


def _project(tensor: Tensor, factors: list[Tensor], skip: int | None = None) -> Tensor:
    """``tensor`` contracted with every factor's transpose, except that of mode ``skip``."""
    for mode, factor in enumerate(factors):
        if mode != skip:
            tensor = torch.movedim(torch.tensordot(tensor, factor.to(tensor.dtype), dims=([mode], [0])), -1, mode)
    return tensor


def tucker_basis(
    weights: Tensor,
    rank_expert: int | float,
    rank_out: int | float,
    rank_in: int | float,
    hooi_sweeps: int = 0,
    whitening: str = "none",
    sigma_in: Tensor | None = None,
    sigma_out: Tensor | None = None,
    whitening_eps: float = 1e-5,
) -> TuckerBasis:
    """Truncated HOSVD of stacked down-projections by Gram matrices and eigh, refined by HOOI sweeps.

    Whitening "in" decomposes ``W_j S_in`` with ``S_in S_in^T = sigma_in + eps I`` and re-colours
    ``U_in = S_in^{-T} Ut_in``; "out" decomposes ``S_out^{-1} W_j`` and re-colours ``U_out = S_out Ut_out``, so that the
    decomposed matrix maps whitened inputs to whitened outputs (MoTE paper section 3.2, TD-MoE's recipe).

    Args:
        weights: ``[E, d, h]``, any float dtype; products in float32 or better, eigh in float64.
        rank_expert, rank_out, rank_in: ints, or fractions of E, d and h.
        sigma_in: ``[h, h]`` second moment of the keys, pooled over experts; for "in" and "both".
        sigma_out: ``[d, d]`` second moment of the MoE block's output; for "out" and "both".

    Raises:
        HyperParamsError: rank, sweeps, whitening or eps out of range. NumericalError: weights not finite.
    """
    if whitening not in WHITENING:
        raise HyperParamsError(f"whitening must be one of {', '.join(WHITENING)}; found {whitening!r}.")
    if hooi_sweeps < 0:
        raise HyperParamsError(f"hooi_sweeps must be >= 0; found {hooi_sweeps}.")
    ranks = [
        resolve_rank(rank, size, name)
        for rank, size, name in zip(
            (rank_expert, rank_out, rank_in), weights.shape, ("rank_expert", "rank_out", "rank_in"), strict=True
        )
    ]
    tensor = weights if weights.dtype == torch.float64 else weights.to(torch.float32)
    if not torch.isfinite(tensor).all():
        raise NumericalError("The down-projections hold NaN or infinity; reload the model.")
    s_in = s_out = None
    if whitening in ("in", "both"):
        s_in = whitening_factor(_required(sigma_in, "sigma_in", whitening), whitening_eps)
        tensor = tensor @ s_in.to(tensor.dtype)
    if whitening in ("out", "both"):
        s_out = whitening_factor(_required(sigma_out, "sigma_out", whitening), whitening_eps)
        tensor = torch.linalg.solve_triangular(s_out.to(tensor.dtype), tensor, upper=False)
    factors = [_leading(_mode_gram(tensor, mode), rank) for mode, rank in enumerate(ranks)]
    for _ in range(hooi_sweeps):
        for mode, rank in enumerate(ranks):
            factors[mode] = _leading(_mode_gram(_project(tensor, factors, skip=mode), mode), rank)
    total = float((tensor.to(torch.float64) ** 2).sum())
    kept = float((_project(tensor, factors).to(torch.float64) ** 2).sum())
    error = (max(0.0, total - kept) / total) ** 0.5 if total > 0 else 0.0
    u_expert, u_out, u_in = factors
    if s_in is not None:
        u_in = torch.linalg.solve_triangular(s_in.T, u_in, upper=True)
    if s_out is not None:
        u_out = s_out @ u_out
    return TuckerBasis(u_expert, u_out, u_in, error)


def _required(sigma: Tensor | None, name: str, whitening: str) -> Tensor:
    if sigma is None:
        raise HyperParamsError(f"whitening '{whitening}' needs {name}; collect statistics first.")
    return sigma
