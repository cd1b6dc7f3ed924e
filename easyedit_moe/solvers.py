"""Solvers of one objective for expert updates (pure, torch only).

    min over Delta of  sum_t || r_t - sum_j g_tj Delta_j k_tj ||^2 + lambda sum_j tr(Delta_j M_j^{-1} Delta_j^T)

``M_j`` is the *metric*: the identity (plain ridge), the null-space projector ``P_j`` (MoEEdit, AlphaEdit lifted to
experts) or the inverse covariance ``C_j^{-1}`` (MEMIT and ROME lifted). A metric is any object with
``apply(expert, x)`` returning ``M_j x`` for ``x [h, n]``. Every solution has the form ``Delta_j = B_j (M_j Z_j)^T``
with the gated keys ``Z_j [h, T_j]``, and stays factored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from easyedit_moe.errors import HyperParamsError, NumericalError
from easyedit_moe.nullspace import resolve_coverage
from easyedit_moe.routing import ExpertDesign, FactoredUpdate, RoutedKeys
from easyedit_moe.tucker import TuckerBasis

SYSTEM_DTYPE = torch.float64


def _cholesky(matrix: Tensor) -> Tensor | None:
    """Lower Cholesky factor, or None where ``matrix`` is not positive definite to working precision.

    Rounding can leave a singular matrix with tiny positive pivots, and its "solution" would be noise of size 1 / eps.
    ``A_ii (A^{-1})_ii`` says how much of row i the others do not explain, whatever the rows' scale.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return None
    inflation = torch.diagonal(matrix) * torch.diagonal(torch.cholesky_inverse(factor))
    limit = 0.1 / (max(len(matrix), 1) * torch.finfo(matrix.dtype).eps)
    return factor if (inflation <= limit).all() else None


class Metric(Protocol):
    """Per-expert metric ``M_j``."""

    def apply(self, expert: int, x: Tensor) -> Tensor:
        """``M_j x`` for ``x [h, n]``."""
        ...


@dataclass(frozen=True)
class IdentityMetric:
    """``M_j = I``: plain ridge."""

    def apply(self, expert: int, x: Tensor) -> Tensor:
        """``x`` itself."""
        return x


@dataclass(frozen=True)
class CovarianceMetric:
    """``M_j = C_j^{-1}`` from Cholesky factors; an expert without a factor is never edited."""

    factors: tuple[Tensor | None, ...]

    def apply(self, expert: int, x: Tensor) -> Tensor:
        """``C_j^{-1} x`` for ``x [h, n]``."""
        factor = self.factors[expert]
        if factor is None:
            return torch.zeros_like(x)
        return torch.cholesky_solve(x, factor.to(device=x.device, dtype=x.dtype))


def covariance_metric(
    moments: Tensor, counts: Tensor, ridge: float, min_count: int = 0, low_coverage: str = "keep"
) -> CovarianceMetric:
    """``C_j^{-1}`` of ``moments [E, h, h]``, each with ``ridge`` times the pooled mean variance on its diagonal.

    An expert that ``low_coverage`` declares "identity" gets the pooled mean variance times I, which is what
    "no direction is special" means in the units of C.

    Raises:
        NumericalError: a moment that is not finite, or not positive definite even with the ridge; no statistics at
            all for an "identity" expert. HyperParamsError: a negative ridge.
    """
    if not ridge >= 0:
        raise HyperParamsError(f"covariance_ridge must be >= 0; found {ridge}.")
    resolved = resolve_coverage(moments, counts, min_count, low_coverage)
    size = moments.shape[-1]
    weights = counts.to(torch.float64)
    traces = torch.diagonal(moments, dim1=-2, dim2=-1).to(torch.float64).mean(-1)
    scale = float((traces * weights).sum() / weights.sum().clamp_min(1))
    eye = torch.eye(size, dtype=torch.float64, device=moments.device)
    factors: list[Tensor | None] = []
    for expert, moment in enumerate(resolved):
        if isinstance(moment, str):
            if moment == "identity" and scale == 0:
                raise NumericalError("All covariances are zero: they give identity no scale. Use a larger corpus.")
            factors.append(None if moment == "frozen" else eye * scale**0.5)
            continue
        factor = _cholesky(moment + ridge * scale * eye)
        if factor is None:
            raise NumericalError(
                f"The covariance of expert {expert} ({int(counts[expert])} tokens, h = {size}) is not positive "
                f"definite with covariance_ridge {ridge}. Raise it, or use a larger corpus."
            )
        factors.append(factor)
    return CovarianceMetric(tuple(factors))


def factor_ridge(gram: Tensor, lambda_reg: float) -> Tensor:
    """Cholesky factor of ``gram + lambda I``.

    Raises:
        HyperParamsError: a negative or infinite lambda. NumericalError: a matrix that is not positive definite.
    """
    if not 0 <= lambda_reg < float("inf"):
        raise HyperParamsError(f"lambda_reg must be finite and >= 0; found {lambda_reg}.")
    if not torch.isfinite(gram).all():
        raise NumericalError("The keys of these requests hold NaN or infinity: the model's weights are not finite.")
    eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    factor = _cholesky(gram + lambda_reg * eye)
    if factor is None:
        raise NumericalError(
            f"The {gram.shape[0]} x {gram.shape[0]} system is singular at lambda_reg {lambda_reg}: some requests "
            "share a key, or have none left in the null space. Raise lambda_reg."
        )
    return factor


def _wanted(residual: Tensor) -> Tensor:
    """``residual`` in float64, or NumericalError where it is not finite."""
    if not torch.isfinite(residual).all():
        raise NumericalError(
            "The residuals hold NaN or infinity: the target vectors or the hidden states are not finite."
        )
    return residual.to(SYSTEM_DTYPE)


@dataclass(frozen=True)
class _Block:
    """One expert's part of the problem: rows, ``M_j Z_j`` and ``Z_j^T M_j Z_j``."""

    expert: int
    rows: Tensor
    right: Tensor
    kernel: Tensor


def _blocks(design: list[ExpertDesign], metric: Metric) -> list[_Block]:
    blocks = []
    for part in design:
        right = metric.apply(part.expert, part.z)
        kernel = part.z.T @ right
        blocks.append(_Block(part.expert, part.rows, right, (kernel + kernel.T) / 2))
    return blocks


def solve_exact(keys: RoutedKeys, residual: Tensor, lambda_reg: float, metric: Metric) -> FactoredUpdate:
    """The exact minimiser ("Global", MoTE paper section 3.1) by one T x T system (Woodbury / push-through).

    ``Delta_j = R (sum_j Z_j^T M_j Z_j + lambda I)^{-1} Z_j^T M_j``, solved in float64 by Cholesky.

    Args:
        keys: of T tokens.
        residual: ``[T, d]``, r; rows of zeros keep what those keys now yield.

    Raises:
        NumericalError: singular or non-finite system or residual. HyperParamsError: negative lambda.
    """
    blocks = _blocks(keys.design(SYSTEM_DTYPE), metric)
    gram = torch.zeros(keys.num_tokens, keys.num_tokens, dtype=SYSTEM_DTYPE, device=residual.device)
    for block in blocks:
        gram[block.rows[:, None], block.rows[None, :]] += block.kernel
    factor = factor_ridge(gram, lambda_reg)
    left = torch.cholesky_solve(_wanted(residual), factor).T.contiguous()
    return FactoredUpdate(
        left, tuple(b.expert for b in blocks), tuple(b.rows for b in blocks), tuple(b.right for b in blocks)
    )


@dataclass(frozen=True)
class BCDReport:
    """Objective before the first pass and after each one; never increasing."""

    objective: tuple[float, ...]


def expert_orders(num_experts: int, num_passes: int, seed: int = 42) -> list[Tensor]:
    """One random order of the experts per pass, from ``torch.randperm`` with a CPU generator."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(num_experts, generator=generator) for _ in range(num_passes)]


def solve_bcd(
    keys: RoutedKeys, residual: Tensor, lambda_reg: float, metric: Metric, orders: list[Tensor]
) -> tuple[FactoredUpdate, BCDReport]:
    """Randomised block coordinate descent over experts (MoEEdit, arXiv 2602.10965) with a running residual.

    A visit to expert j costs O(T_j^2 d): with ``Delta_j = B_j (M_j Z_j)^T`` and ``K_j = Z_j^T M_j Z_j``, the residual
    regains ``B_j K_j``, then ``B_j = S (K_j + lambda I)^{-1}``, then loses the new ``B_j K_j``.

    Args:
        keys, residual, lambda_reg, metric: as in :func:`solve_exact`.
        orders: the order of experts of each pass, see :func:`expert_orders`.

    Raises:
        NumericalError, HyperParamsError: as in :func:`solve_exact`; HyperParamsError for an empty ``orders``.
    """
    if not orders:
        raise HyperParamsError("num_passes must be at least 1.")
    blocks = _blocks(keys.design(SYSTEM_DTYPE), metric)
    position = {block.expert: i for i, block in enumerate(blocks)}
    factors = [factor_ridge(block.kernel, lambda_reg) for block in blocks]
    running = _wanted(residual).clone()
    solution = [running.new_zeros(len(block.rows), running.shape[1]) for block in blocks]

    def objective() -> float:
        penalty = sum(float((b * (block.kernel @ b)).sum()) for b, block in zip(solution, blocks, strict=True))
        return float((running**2).sum()) + lambda_reg * penalty

    history = [objective()]
    for order in orders:
        for expert in order.tolist():
            i = position.get(expert)
            if i is None:
                continue
            block = blocks[i]
            local = running[block.rows] + block.kernel @ solution[i]
            solution[i] = torch.cholesky_solve(local, factors[i])
            running[block.rows] = local - block.kernel @ solution[i]
        history.append(objective())
    columns, start = [], 0
    for block in blocks:
        columns.append(torch.arange(start, start + len(block.rows), device=residual.device))
        start += len(block.rows)
    update = FactoredUpdate(
        torch.cat([running[:0], *solution]).T.contiguous(),
        tuple(b.expert for b in blocks),
        tuple(columns),
        tuple(b.right for b in blocks),
    )
    return update, BCDReport(tuple(history))


def core_features(keys: RoutedKeys, basis: TuckerBasis, metric: Metric) -> Tensor:
    """``phi_t = sum_j g_tj U_e[j] (x) (U_in^T M_j k_tj)`` as ``[T, re * ri]`` float64 (MoTE paper section 3.2)."""
    u_e, u_in = basis.u_expert.to(SYSTEM_DTYPE), basis.u_in.to(SYSTEM_DTYPE)
    phi = torch.zeros(keys.num_tokens, u_e.shape[1], u_in.shape[1], dtype=SYSTEM_DTYPE, device=u_in.device)
    for part in keys.design(SYSTEM_DTYPE):
        inner = (u_in.T @ metric.apply(part.expert, part.z)).T
        phi.index_add_(0, part.rows, u_e[part.expert][None, :, None] * inner[:, None, :])
    return phi.flatten(1)


def solve_core(
    keys: RoutedKeys,
    residual: Tensor,
    lambda_reg: float,
    metric: Metric,
    basis: TuckerBasis,
    form: str = "auto",
) -> Tensor:
    """Ridge on the Tucker core (MoTE, arXiv 2605.16686): G of shape ``[re, ro, ri]``, float64.

    ``G = argmin sum_t ||r_t - U_out G phi_t||^2 + lambda ||U_out G||^2``. ``form`` is "dual" (T x T), "primal"
    ((re ri) x (re ri)) or "auto", which takes the smaller.

    Raises:
        NumericalError, HyperParamsError: as in :func:`solve_exact`.
    """
    phi = core_features(keys, basis, metric)
    u_out = basis.u_out.to(SYSTEM_DTYPE)
    # Coordinates of the residual in span(U_out); for orthonormal columns this is R U_out.
    reduced = torch.linalg.lstsq(u_out, _wanted(residual).T).solution.T
    if form == "auto":
        form = "dual" if phi.shape[0] <= phi.shape[1] else "primal"
    if form == "dual":
        core = torch.cholesky_solve(reduced, factor_ridge(phi @ phi.T, lambda_reg)).T @ phi
    elif form == "primal":
        core = torch.cholesky_solve(phi.T @ reduced, factor_ridge(phi.T @ phi, lambda_reg)).T
    else:
        raise HyperParamsError(f"form must be auto, dual or primal; found {form!r}.")
    re, ri = basis.u_expert.shape[1], basis.u_in.shape[1]
    return core.reshape(-1, re, ri).transpose(0, 1).contiguous()


def expand_core(core: Tensor, basis: TuckerBasis, metric: Metric) -> FactoredUpdate:
    """``Delta_j = U_out (sum_a U_e[j,a] G_a) U_in^T M_j`` for all experts, with ``left = U_out`` shared."""
    u_e, u_in = basis.u_expert.to(SYSTEM_DTYPE), basis.u_in.to(SYSTEM_DTYPE)
    columns = torch.arange(core.shape[1], device=core.device)
    right = []
    for expert in range(u_e.shape[0]):
        mixed = torch.einsum("a,aoi->oi", u_e[expert], core)
        right.append(metric.apply(expert, u_in @ mixed.T))
    experts = tuple(range(u_e.shape[0]))
    return FactoredUpdate(basis.u_out.to(SYSTEM_DTYPE), experts, (columns,) * len(experts), tuple(right))


def objective(keys: RoutedKeys, residual: Tensor, lambda_reg: float, metric: Metric, update: FactoredUpdate) -> float:
    """The objective at a solution ``Delta_j = B_j (M_j Z_j)^T``, whose penalty needs no inverse of ``M_j``.

    Only for updates of :func:`solve_exact` and :func:`solve_bcd`, whose right factors are ``M_j Z_j``.
    """
    left = residual.to(SYSTEM_DTYPE) - update.apply(keys)
    total = float((left**2).sum())
    parts = {block.expert: block for block in _blocks(keys.design(SYSTEM_DTYPE), metric)}
    for expert, columns in zip(update.experts, update.columns, strict=True):
        b = update.left[:, columns]
        total += lambda_reg * float((b * (b @ parts[expert].kernel)).sum())
    return total
