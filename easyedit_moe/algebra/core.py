"""Ridge on a Tucker core: MoTE (pure, torch only)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from easyedit_moe.algebra.coordinates import CoreCoordinates
from easyedit_moe.algebra.held import HeldSystem
from easyedit_moe.algebra.metric import Metric
from easyedit_moe.algebra.routed_keys import RoutedKeys
from easyedit_moe.algebra.systems import (
    CHUNK,
    SYSTEM_DTYPE,
    check_lambda,
    factor_ridge_,
    finite_residual,
    resolve_form,
    solve_factored,
    total_of,
)
from easyedit_moe.algebra.tucker import TuckerBasis


@dataclass(frozen=True)
class FactoredCore:
    """A Tucker core ``G = sum_t a_t (x) phi_t [re, ro, ri]`` by its factors: at MoTE's ranks a dense one may be half as
    large as the weights.

    Attributes:
        left: ``[ro, T]``, the a_t.
        expert: ``[T, K]``, the experts of each token.
        inner: ``[T, K, ri]``, ``g_tj U_in^T M_j k_tj``; zero in padded slots.
        u_expert: ``[E, re]``, expert factor of the basis it was solved in.
    """

    left: Tensor
    expert: Tensor
    inner: Tensor
    u_expert: Tensor

    def features(self, tokens: slice = slice(None), inner: slice = slice(None)) -> Tensor:
        """``phi`` of some tokens as ``[t, re, i]``: ``sum_j U_e[j] (x) g_tj U_in^T M_j k_tj``."""
        return self.u_expert.to(self.inner.dtype)[self.expert[tokens]].mT @ self.inner[tokens, :, inner]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> FactoredCore:
        """The same core on another device or in another dtype."""
        left, inner, u_expert = (part.to(device=device, dtype=dtype) for part in (self.left, self.inner, self.u_expert))
        return FactoredCore(left, self.expert.to(device=device), inner, u_expert)

    def by_directions(self) -> FactoredCore:
        """The same core with phi itself for ``inner [T, re, ri]``, as if each expert direction were an expert."""
        tokens, re = len(self.inner), self.u_expert.shape[1]
        expert = torch.arange(re, device=self.left.device).expand(tokens, re)
        return FactoredCore(self.left, expert, self.features(), torch.eye(re).to(self.left))

    def smallest(self) -> FactoredCore | Tensor:
        """The form of the fewest numbers: by experts, by directions or, from ro tokens on, dense.

        With fewer tokens a dense core would be of a higher rank.
        """
        tokens, slots, width = self.inner.shape
        re, height = self.u_expert.shape[1], len(self.left)
        if tokens >= height and tokens * (min(slots, re) * width + height) > re * height * width:
            return self.dense()
        return self if slots <= re else self.by_directions()

    @staticmethod
    def cat(cores: Sequence[FactoredCore]) -> FactoredCore:
        """The sum of cores: the tokens of all."""
        first, slots = cores[0], {core.expert.shape[1] for core in cores}
        if len(slots) > 1 or not all(torch.equal(core.u_expert.to(first.u_expert), first.u_expert) for core in cores):
            cores = [core.to(dtype=SYSTEM_DTYPE).by_directions() for core in cores]
        cores = [core.to(first.left.device, first.left.dtype) for core in cores]
        left, expert = torch.cat([c.left for c in cores], dim=1), torch.cat([c.expert for c in cores])
        return FactoredCore(left, expert, torch.cat([c.inner for c in cores]), cores[0].u_expert)

    def dense(self) -> Tensor:
        """``G [re, ro, ri]``, in chunks of tokens."""
        tokens, _, width = self.inner.shape
        re = self.u_expert.shape[1]
        core = self.left.new_zeros(len(self.left), re * width)
        step = max(1, CHUNK // (re * width))
        for start in range(0, tokens, step):
            chosen = slice(start, start + step)
            core.addmm_(self.left[:, chosen], self.features(chosen).flatten(1))
        return core.reshape(-1, re, width).transpose(0, 1).contiguous()


def _core_without_left(keys: RoutedKeys, basis: TuckerBasis, metric: Metric) -> FactoredCore:
    coordinates = CoreCoordinates(basis, metric)
    inner = coordinates.encode(keys).key
    return FactoredCore(inner.new_zeros(0, keys.num_tokens), keys.expert, inner, coordinates.u_expert)


def core_features(keys: RoutedKeys, basis: TuckerBasis, metric: Metric) -> Tensor:
    """``phi_t = sum_j g_tj U_e[j] (x) (U_in^T M_j k_tj)`` as ``[T, re * ri]`` float64 (MoTE paper section 3.2)."""
    return _core_without_left(keys, basis, metric).features().flatten(1)


def core_energy(keys: RoutedKeys, basis: TuckerBasis, metric: Metric) -> float:
    """``mean_t ||phi_t||^2``: what `easyedit_moe.algebra.metric.mean_energy` is for the system of the core.

    Raises:
        NumericalError: keys or gates that are not finite.
    """
    core, parts = _core_without_left(keys, basis, metric), []
    step = max(1, CHUNK // (basis.u_expert.shape[1] * basis.u_in.shape[1]))
    for start in range(0, keys.num_tokens, step):
        parts.append((core.features(slice(start, start + step)) ** 2).sum())
    return total_of(parts) / max(keys.num_tokens, 1)


def _is_orthogonal(matrix: Tensor) -> bool:
    """Whether a square matrix times its transpose is the identity."""
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return matrix.shape[0] == matrix.shape[1] and bool(((matrix @ matrix.T - eye).abs() < 1e-10).all())


def _core_gram(core: FactoredCore, keys: RoutedKeys) -> Tensor:
    """``Phi Phi^T [T, T]``. With all expert directions kept, different experts do not mix and it is a sum of T_j x T_j
    kernels; else it is summed over chunks of the input rank.
    """
    tokens, width = len(core.inner), core.inner.shape[2]
    gram = core.inner.new_zeros(tokens, tokens)
    if _is_orthogonal(core.u_expert):
        flat, slots = core.inner.reshape(-1, width), core.expert.shape[1]
        for positions in keys.slots().values():
            rows, x = positions // slots, flat[positions]
            gram[rows[:, None], rows[None, :]] += x @ x.T
        return gram
    step = max(1, CHUNK // max(1, tokens * core.u_expert.shape[1]))
    for start in range(0, width, step):
        phi = core.features(inner=slice(start, start + step)).flatten(1)
        gram.addmm_(phi, phi.T)
    return gram


def solve_mote(
    keys: RoutedKeys, residual: Tensor, lambda_reg: float, metric: Metric, basis: TuckerBasis, form: str = "auto"
) -> FactoredCore | Tensor:
    """Ridge on the Tucker core (MoTE, arXiv 2605.16686), float64: factored from the dual, ``[re, ro, ri]`` from the
    primal form.

    ``G = argmin sum_t ||r_t - U_out G phi_t||^2 + lambda ||U_out G||^2``. ``form`` is "dual" (T x T), "primal"
    ((re ri) x (re ri)) or "auto", which takes the smaller. Neither form holds all of Phi ``[T, re ri]``.

    Raises:
        NumericalError, HyperParamsError: as in `solve_exact`.
    """
    check_lambda(lambda_reg)
    wanted, core = finite_residual(residual), _core_without_left(keys, basis, metric)
    re, ri = basis.u_expert.shape[1], basis.u_in.shape[1]
    reduced = basis.coordinates(wanted.T).T
    if resolve_form(form, keys.num_tokens, re * ri, lambda_reg) == "dual":
        left = solve_factored(factor_ridge_(_core_gram(core, keys), lambda_reg), reduced).T.contiguous()
        return replace(core, left=left)
    gram, moved = wanted.new_zeros(re * ri, re * ri), wanted.new_zeros(re * ri, reduced.shape[1])
    step = max(1, CHUNK // (re * ri))
    for start in range(0, keys.num_tokens, step):
        phi = core.features(slice(start, start + step)).flatten(1)
        gram.addmm_(phi.T, phi)
        moved.addmm_(phi.T, reduced[start : start + step])
    dense = solve_factored(factor_ridge_(gram, lambda_reg), moved).T
    return dense.reshape(-1, re, ri).transpose(0, 1).contiguous()


def solve_mote_held(keys: RoutedKeys, residual: Tensor, held: HeldSystem, coordinates: CoreCoordinates) -> FactoredCore:
    """As `solve_mote` with the held rows before ``keys``, their residuals zero; a core of as many terms as ``keys``.

    Raises:
        NumericalError: as there.
    """
    wanted, reduced = finite_residual(residual), held.reduce(keys)
    coefficients = coordinates.basis.coordinates(wanted.T).T
    left = solve_factored(factor_ridge_(reduced.gram.contiguous(), held.lambda_reg), coefficients).T.contiguous()
    tokens = keys.num_tokens
    if reduced.features is not None:
        # As `FactoredCore.by_directions`.
        re = coordinates.u_expert.shape[1]
        inner = reduced.features.T.reshape(tokens, re, coordinates.width)
        expert = torch.arange(re, device=left.device).expand(tokens, re)
        return FactoredCore(left, expert, inner, torch.eye(re, dtype=left.dtype, device=left.device))
    columns = reduced.columns or {}
    expert = torch.tensor(list(columns), device=left.device).expand(tokens, len(columns))
    inner = torch.stack([x.T for x in columns.values()], dim=1)
    return FactoredCore(left, expert, inner, coordinates.u_expert)


def solve_core(
    keys: RoutedKeys, residual: Tensor, lambda_reg: float, metric: Metric, basis: TuckerBasis, form: str = "auto"
) -> Tensor:
    """The core of `solve_mote` as a dense ``[re, ro, ri]``: for tests and small problems only."""
    core = solve_mote(keys, residual, lambda_reg, metric, basis, form)
    return core if isinstance(core, Tensor) else core.dense()
