"""The metric of the objective, and each expert's part of the problem as its root shows it; see the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from easyedit_moe.algebra.nullspace import resolve_coverage
from easyedit_moe.algebra.routed_keys import FactoredUpdate, RoutedKeys
from easyedit_moe.algebra.systems import SYSTEM_DTYPE, factor_stack_, keys_not_finite, regular, total_of
from easyedit_moe.errors import HyperParamsError, NumericalError


class Metric(Protocol):
    """Per-expert metric ``M_j = N_j^T N_j``."""

    def apply(self, expert: int, x: Tensor) -> Tensor:
        """``M_j x`` for ``x [h, n]``."""
        ...

    def root(self, expert: int, x: Tensor) -> Tensor:
        """``N_j x`` as ``[n_j, n]``."""
        ...

    def lift(self, expert: int, y: Tensor) -> Tensor:
        """``N_j^T y`` as ``[h, n]`` for combinations y of what `root` returned: ``lift(root(x)) = M_j x``."""
        ...

    def inverse(self, expert: int, x: Tensor) -> Tensor:
        """The pseudo-inverse of M_j times x, for x in the range of M_j."""
        ...


@dataclass(frozen=True)
class IdentityMetric:
    """``M_j = I``: plain ridge."""

    def apply(self, expert: int, x: Tensor) -> Tensor:
        """``x`` itself."""
        return x

    root = lift = inverse = apply


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

    def root(self, expert: int, x: Tensor) -> Tensor:
        """``L_j^{-1} x`` with ``C_j = L_j L_j^T``."""
        factor = self.factors[expert]
        if factor is None:
            return torch.zeros_like(x)
        return torch.linalg.solve_triangular(factor.to(device=x.device, dtype=x.dtype), x, upper=False)

    def lift(self, expert: int, y: Tensor) -> Tensor:
        """``L_j^{-T} y``."""
        factor = self.factors[expert]
        if factor is None:
            return torch.zeros_like(y)
        return torch.linalg.solve_triangular(factor.to(device=y.device, dtype=y.dtype).mT, y, upper=True)

    def inverse(self, expert: int, x: Tensor) -> Tensor:
        """``C_j x``."""
        factor = self.factors[expert]
        if factor is None:
            return torch.zeros_like(x)
        factor = factor.to(device=x.device, dtype=x.dtype)
        return factor @ (factor.mT @ x)


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
    if scale == 0 and any(isinstance(moment, str) and moment == "identity" for moment in resolved):
        raise NumericalError("All covariances are zero: they give identity no scale. Use a larger corpus.")
    parts = {
        expert: factor_stack_((moment + ridge * scale * eye)[None])
        for expert, moment in enumerate(resolved)
        if isinstance(moment, Tensor)
    }
    _, good = regular(list(parts.values()), [size] * len(parts), ridge * scale)
    for expert, fine in zip(parts, good, strict=True):
        if not fine:
            raise NumericalError(
                f"The covariance of expert {expert} ({int(counts[expert])} tokens, h = {size}) is not positive "
                f"definite with covariance_ridge {ridge}. Raise it, or use a larger corpus."
            )
    factors = [parts[j].factors[0] if j in parts else _stand_in(one, scale, eye) for j, one in enumerate(resolved)]
    return CovarianceMetric(tuple(factors))


def _stand_in(coverage: Tensor | str, scale: float, eye: Tensor) -> Tensor | None:
    """The factor of an expert that has no moment of its own."""
    return None if coverage == "frozen" else eye * scale**0.5


@dataclass(frozen=True)
class ExpertBlock:
    """One expert's part of the problem: rows ``[T_j]`` and ``F_j = N_j Z_j [n_j, T_j]``."""

    expert: int
    rows: Tensor
    root: Tensor

    @property
    def unknowns(self) -> int:
        """n_j, the rows of the root: what this expert adds to the side of the primal system."""
        return self.root.shape[0]


def expert_blocks(keys: RoutedKeys, metric: Metric) -> list[ExpertBlock]:
    """One `ExpertBlock` in float64 per expert that is hit, in increasing order of experts.

    Raises:
        NumericalError: keys or gates that are not finite.
    """
    if not (torch.isfinite(keys.key).all() and torch.isfinite(keys.gate).all()):
        raise keys_not_finite()
    return [ExpertBlock(p.expert, p.rows, metric.root(p.expert, p.z)) for p in keys.design(SYSTEM_DTYPE)]


def mean_energy(keys: RoutedKeys, metric: Metric) -> float:
    """``mean_t sum_j g_tj^2 k_tj^T M_j k_tj``: the mean squared norm of the gated keys as the metric leaves them.

    It is the mean of the dual system's diagonal, so a ridge in units of it is one that does not depend on how large a
    model's keys and gates are.

    Raises:
        NumericalError: keys or gates that are not finite.
    """
    return total_of([(block.root**2).sum() for block in expert_blocks(keys, metric)]) / max(keys.num_tokens, 1)


def transposed_root(metric: Metric, expert: int, like: Tensor, d_hidden: int) -> Tensor:
    """``N_j^T [h, n_j]``."""
    return metric.root(expert, torch.eye(d_hidden, dtype=like.dtype, device=like.device)).T


def objective(keys: RoutedKeys, residual: Tensor, lambda_reg: float, metric: Metric, update: FactoredUpdate) -> float:
    """The objective at ``Delta_j = B_j V_j^T`` of any solver here, whose V_j lie in the range of M_j."""
    left = residual.to(SYSTEM_DTYPE) - update.apply(keys)
    parts = [(left**2).sum()]
    for expert, columns, right in zip(update.experts, update.columns, update.right, strict=True):
        b = update.left[:, columns]
        parts.append(lambda_reg * (b * (b @ (right.T @ metric.inverse(expert, right)))).sum())
    return total_of(parts)
