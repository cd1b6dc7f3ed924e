"""Solvers of one objective for expert updates (pure, torch only).

    min over Delta of  sum_t || r_t - sum_j g_tj Delta_j k_tj ||^2 + lambda sum_j tr(Delta_j M_j^{-1} Delta_j^T)

``M_j`` is the *metric*: the identity (plain ridge), the null-space projector ``P_j`` (MoEEdit, AlphaEdit lifted to
experts) or the inverse covariance ``C_j^{-1}`` (MEMIT and ROME lifted). It is known by a root N_j, ``M_j = N_j^T N_j``,
so all that iterates sees ``F_j = N_j Z_j`` of the gated keys ``Z_j [h, T_j]`` and ``K_j = F_j^T F_j``. No solver forms
an update ``[E, d, h]``: solutions stay factored until they are written.

The side on which a system is set up follows from the sizes. T = tokens, n_j = rows of N_j (h, or less for a projector):

=========== ============================ ======================================== ===========================
solver      dual, where its side is less primal                                   float64 held at once
=========== ============================ ======================================== ===========================
exact       T x T                        sum_j n_j, its Gram summed over tokens   side^2 + 2 T K h + 2 T d
BCD         T_j x T_j, per expert        n_j x n_j, per expert                    sum_j side_j^2 + 2 T K h + T K d
MoTE        T x T                        re ri, its Gram summed over tokens       side^2 + T K (h + ri) + 2 T d
=========== ============================ ======================================== ===========================

Systems are factored in place, so one of side T costs 8 T^2 bytes: 8 MB at T = 1000, 800 MB at T = 10 000. The primal
form is only taken for lambda > 0; without a ridge more tokens than unknowns are a singular system, which is an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from easyedit_moe.errors import HyperParamsError, NumericalError
from easyedit_moe.nullspace import resolve_coverage
from easyedit_moe.routing import FactoredUpdate, RoutedKeys
from easyedit_moe.tucker import TuckerBasis

SYSTEM_DTYPE = torch.float64


_SMALL_PASS = 2e9
"""Operations of a BCD pass below which a GPU would mostly wait for launches, so that it runs on the CPU."""
_CHUNK = 2**23
"""Numbers in a temporary of the accumulated Gram matrices (64 MB in float64)."""


def _inflation_limit(size: int) -> float:
    """Bound on ``A_ii (A^{-1})_ii`` up to which a system of this size is regular in float64."""
    return 0.1 / (max(size, 1) * torch.finfo(SYSTEM_DTYPE).eps)


def _cholesky_(matrix: Tensor, floor: float = 0.0) -> Tensor | None:
    """Lower Cholesky factor in the memory of ``matrix`` (square, contiguous), or None where it is not positive
    definite to working precision. ``floor`` is a known lower bound on the eigenvalues of the exact matrix.

    Rounding can leave a singular matrix with tiny positive pivots, and its "solution" would be noise of size 1 / eps.
    ``A_ii (A^{-1})_ii`` says how much of row i the others do not explain, whatever the rows' scale. It is at most
    ``A_ii / floor``, and only where that does not settle it, the inverse is computed.
    """
    diagonal = torch.diagonal(matrix).clone()
    # The transpose of a contiguous matrix is in LAPACK's order, so it is factored where it lies.
    target, failed = matrix.mT, torch.empty((), dtype=torch.int32, device=matrix.device)
    factor, failed = torch.linalg.cholesky_ex(target, out=(target, failed))
    if failed:
        return None
    limit = _inflation_limit(len(matrix))
    if len(matrix) == 0 or (floor > 0 and float(diagonal.max()) <= limit * floor):
        return factor
    inflation = diagonal * torch.diagonal(torch.cholesky_inverse(factor))
    return factor if (inflation <= limit).all() else None


def _solve_factored(factor: Tensor, right: Tensor) -> Tensor:
    """``(L L^T)^{-1} right``; unlike ``torch.cholesky_solve`` without a copy of the factor."""
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


class Metric(Protocol):
    """Per-expert metric ``M_j = N_j^T N_j``."""

    def apply(self, expert: int, x: Tensor) -> Tensor:
        """``M_j x`` for ``x [h, n]``."""
        ...

    def root(self, expert: int, x: Tensor) -> Tensor:
        """``N_j x`` as ``[n_j, n]``."""
        ...

    def lift(self, expert: int, y: Tensor) -> Tensor:
        """``N_j^T y`` as ``[h, n]`` for combinations y of what :meth:`root` returned: ``lift(root(x)) = M_j x``."""
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
    factors: list[Tensor | None] = []
    for expert, moment in enumerate(resolved):
        if isinstance(moment, str):
            if moment == "identity" and scale == 0:
                raise NumericalError("All covariances are zero: they give identity no scale. Use a larger corpus.")
            factors.append(None if moment == "frozen" else eye * scale**0.5)
            continue
        factor = _cholesky_(moment + ridge * scale * eye, ridge * scale)
        if factor is None:
            raise NumericalError(
                f"The covariance of expert {expert} ({int(counts[expert])} tokens, h = {size}) is not positive "
                f"definite with covariance_ridge {ridge}. Raise it, or use a larger corpus."
            )
        factors.append(factor)
    return CovarianceMetric(tuple(factors))


def factor_ridge(gram: Tensor, lambda_reg: float) -> Tensor:
    """Cholesky factor of ``gram + lambda I``, which is left as it is.

    Raises:
        HyperParamsError: a negative or infinite lambda. NumericalError: a matrix that is not positive definite.
    """
    return _factor_ridge_(gram.clone(memory_format=torch.contiguous_format), lambda_reg)


def _factor_ridge_(gram: Tensor, lambda_reg: float) -> Tensor:
    """As :func:`factor_ridge`, in the memory of ``gram``."""
    _check_lambda(lambda_reg)
    if not math.isfinite(float(gram.sum())) and not torch.isfinite(gram).all():
        raise _keys_not_finite()
    torch.diagonal(gram).add_(lambda_reg)
    factor = _cholesky_(gram, lambda_reg)
    if factor is None:
        raise _singular(len(gram), lambda_reg)
    return factor


def _check_lambda(lambda_reg: float) -> None:
    if not 0 <= lambda_reg < float("inf"):
        raise HyperParamsError(f"lambda_reg must be finite and >= 0; found {lambda_reg}.")


def _keys_not_finite() -> NumericalError:
    return NumericalError("The keys of these requests hold NaN or infinity: the model's weights are not finite.")


def _singular(size: int, lambda_reg: float) -> NumericalError:
    return NumericalError(
        f"The {size} x {size} system is singular at lambda_reg {lambda_reg}: some requests "
        "share a key, or have none left in the null space. Raise lambda_reg."
    )


def _wanted(residual: Tensor) -> Tensor:
    """``residual`` in float64, or NumericalError where it is not finite."""
    if not torch.isfinite(residual).all():
        raise NumericalError(
            "The residuals hold NaN or infinity: the target vectors or the hidden states are not finite."
        )
    return residual.to(SYSTEM_DTYPE)


@dataclass(frozen=True)
class _Block:
    """One expert's part of the problem: rows ``[T_j]`` and ``F_j = N_j Z_j [n_j, T_j]``."""

    expert: int
    rows: Tensor
    root: Tensor


def _blocks(keys: RoutedKeys, metric: Metric) -> list[_Block]:
    if not (torch.isfinite(keys.key).all() and torch.isfinite(keys.gate).all()):
        raise _keys_not_finite()
    return [_Block(p.expert, p.rows, metric.root(p.expert, p.z)) for p in keys.design(SYSTEM_DTYPE)]


def _unknowns(block: _Block) -> int:
    return block.root.shape[0]


def _transposed_root(metric: Metric, expert: int, like: Tensor, d_hidden: int) -> Tensor:
    """``N_j^T [h, n_j]``."""
    return metric.root(expert, torch.eye(d_hidden, dtype=like.dtype, device=like.device)).T


def solve_exact(
    keys: RoutedKeys, residual: Tensor, lambda_reg: float, metric: Metric, form: str = "auto"
) -> FactoredUpdate:
    """The exact minimiser ("Global", MoTE paper section 3.1) by one system, in float64 by Cholesky.

    Dual (Woodbury / push-through): ``Delta_j = R (sum_j Z_j^T M_j Z_j + lambda I_T)^{-1} Z_j^T M_j``. Primal, where
    there are fewer unknowns than tokens: ``Delta = R^T Phi (Phi^T Phi + lambda I)^{-1} N`` with
    ``Phi [T, sum_j n_j]`` the rows ``concat_j g_tj N_j k_tj``, whose Gram matrix is summed over chunks of tokens.

    Args:
        keys: of T tokens.
        residual: ``[T, d]``, r; rows of zeros keep what those keys now yield.
        form: "dual", "primal" or "auto", the smaller.

    Raises:
        NumericalError: singular or non-finite system or residual. HyperParamsError: negative lambda, unknown form.
    """
    _check_lambda(lambda_reg)
    wanted, blocks = _wanted(residual), _blocks(keys, metric)
    unknowns = sum(_unknowns(block) for block in blocks)
    if _form(form, keys.num_tokens, unknowns, lambda_reg) == "primal":
        return _exact_primal(keys, wanted, lambda_reg, metric, blocks)
    gram = wanted.new_zeros(keys.num_tokens, keys.num_tokens)
    for block in blocks:
        gram[block.rows[:, None], block.rows[None, :]] += block.root.T @ block.root
    left = _solve_factored(_factor_ridge_(gram, lambda_reg), wanted).T.contiguous()
    right = tuple(metric.lift(block.expert, block.root) for block in blocks)
    return FactoredUpdate(left, tuple(b.expert for b in blocks), tuple(b.rows for b in blocks), right)


def _form(form: str, tokens: int, unknowns: int, lambda_reg: float) -> str:
    if form == "auto":
        return "primal" if unknowns < tokens and lambda_reg > 0 else "dual"
    if form not in ("dual", "primal"):
        raise HyperParamsError(f"form must be auto, dual or primal; found {form!r}.")
    return form


def _check_ridge(energy: Tensor, unknowns: int, lambda_reg: float) -> None:
    """NumericalError where the dual of a primal system, ``energy`` its diagonal, would count as singular."""
    tokens = len(energy)
    if tokens > unknowns and float(energy.max()) > _inflation_limit(tokens) * lambda_reg:
        raise _singular(tokens, lambda_reg)


def _exact_primal(
    keys: RoutedKeys, wanted: Tensor, lambda_reg: float, metric: Metric, blocks: list[_Block]
) -> FactoredUpdate:
    sizes = [_unknowns(block) for block in blocks]
    total, tokens = sum(sizes), keys.num_tokens
    energy = wanted.new_zeros(tokens)
    for block in blocks:
        energy.index_add_(0, block.rows, (block.root**2).sum(0))
    _check_ridge(energy, total, lambda_reg)
    gram, moved = wanted.new_zeros(total, total), wanted.new_zeros(total, wanted.shape[1])
    step = max(1, _CHUNK // max(total, 1))
    for start in range(0, tokens, step):
        stop, offset = min(start + step, tokens), 0
        phi = wanted.new_zeros(stop - start, total)
        for block, size in zip(blocks, sizes, strict=True):
            low, high = torch.searchsorted(block.rows, torch.tensor([start, stop], device=block.rows.device)).tolist()
            phi[block.rows[low:high] - start, offset : offset + size] = block.root[:, low:high].T
            offset += size
        gram.addmm_(phi.T, phi)
        moved.addmm_(phi.T, wanted[start:stop])
    left = _solve_factored(_factor_ridge_(gram, lambda_reg), moved).T.contiguous()
    columns = torch.arange(total, device=wanted.device).split(sizes)
    right = tuple(_transposed_root(metric, b.expert, b.root, keys.d_hidden) for b in blocks)
    return FactoredUpdate(left, tuple(b.expert for b in blocks), tuple(columns), right)


@dataclass(frozen=True)
class BCDReport:
    """Objective before the first pass and after each one; never increasing."""

    objective: tuple[float, ...]


def expert_orders(num_experts: int, num_passes: int, seed: int = 42) -> list[Tensor]:
    """One random order of the experts per pass, from ``torch.randperm`` with a CPU generator."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(num_experts, generator=generator) for _ in range(num_passes)]


class _Coordinate:
    """One expert's block of a BCD solution: T_j x r by push-through, or n_j x r where that is smaller."""

    def __init__(self, block: _Block, lambda_reg: float, width: int, device: torch.device) -> None:
        root = block.root
        self.primal = lambda_reg > 0 and root.shape[0] < root.shape[1]
        if self.primal:
            _check_ridge((root**2).sum(0), root.shape[0], lambda_reg)
        self.operator = (root.T if self.primal else root.T @ root).to(device)
        system = root @ root.T if self.primal else self.operator
        self.factor = _factor_ridge_(system.to(device, copy=True).contiguous(), lambda_reg)
        self.rows = block.rows.to(device)
        self.solution = torch.zeros(self.operator.shape[1], width, dtype=root.dtype, device=device)

    def visit(self, running: Tensor) -> None:
        """Give the running residual this block's part back, solve for the block anew, and take the new part away."""
        local = running[self.rows].addmm_(self.operator, self.solution)
        self.solution = _solve_factored(self.factor, self.operator.T @ local if self.primal else local)
        running[self.rows] = local.addmm_(self.operator, self.solution, alpha=-1)

    def penalty(self) -> Tensor:
        """``tr(Delta_j M_j^{-1} Delta_j^T)``."""
        return (self.solution * (self.solution if self.primal else self.operator @ self.solution)).sum()


def _row_space(wanted: Tensor) -> tuple[Tensor, Tensor | None]:
    """``(C [T, r], Q [d, r])`` with ``wanted = C Q^T`` and orthonormal columns of Q; ``(wanted, None)`` where r would
    not be well below d. Rows of zeros (remembered edits) cost nothing.
    """
    rows = torch.nonzero(wanted.any(1)).squeeze(1)
    if 2 * len(rows) > wanted.shape[1]:
        return wanted.clone(), None
    q, r = torch.linalg.qr(wanted[rows].T)
    compact = wanted.new_zeros(len(wanted), len(rows))
    compact[rows] = r.T
    return compact, q


def solve_bcd(
    keys: RoutedKeys, residual: Tensor, lambda_reg: float, metric: Metric, orders: list[Tensor]
) -> tuple[FactoredUpdate, BCDReport]:
    """Randomised block coordinate descent over experts (MoEEdit, arXiv 2602.10965) with a running residual.

    With ``Delta_j = B_j^T (M_j Z_j)^T`` and ``K_j = Z_j^T M_j Z_j``, a visit to expert j gives the running residual S
    back ``K_j B_j``, solves ``B_j = (K_j + lambda I)^{-1} S`` and takes the new ``K_j B_j`` away: O(T_j^2 r), whatever
    E and h are. An expert whose T_j exceeds n_j is solved on that side: ``Delta_j = D_j^T N_j`` with
    ``D_j = (F_j F_j^T + lambda I)^{-1} F_j S``. All passes run in the row space of R, of dimension r <= min(T, d); on a
    GPU, small problems are iterated on the CPU.

    Args:
        keys, residual, lambda_reg, metric: as in :func:`solve_exact`.
        orders: the order of experts of each pass, see :func:`expert_orders`.

    Raises:
        NumericalError, HyperParamsError: as in :func:`solve_exact`; HyperParamsError for an empty ``orders``.
    """
    if not orders:
        raise HyperParamsError("num_passes must be at least 1.")
    _check_lambda(lambda_reg)
    wanted, blocks = _wanted(residual), _blocks(keys, metric)
    running, basis = _row_space(wanted)
    work = 4 * running.shape[1] * sum(min(b.root.shape) * b.root.shape[1] for b in blocks)
    device = running.device if work > _SMALL_PASS else torch.device("cpu")
    running = running.to(device)
    coordinates = {b.expert: _Coordinate(b, lambda_reg, running.shape[1], device) for b in blocks}

    def objective() -> float:
        return float((running**2).sum()) + lambda_reg * sum(float(c.penalty()) for c in coordinates.values())

    history = [objective()]
    for order in orders:
        for expert in order.tolist():
            if expert in coordinates:
                coordinates[expert].visit(running)
        history.append(objective())
    solution = torch.cat([running[:0], *(c.solution for c in coordinates.values())]).to(wanted.device)
    left = solution.T.contiguous() if basis is None else basis @ solution.T
    columns = torch.arange(left.shape[1], device=left.device).split([len(c.solution) for c in coordinates.values()])
    right = [
        _transposed_root(metric, b.expert, b.root, keys.d_hidden)
        if coordinates[b.expert].primal
        else metric.lift(b.expert, b.root)
        for b in blocks
    ]
    update = FactoredUpdate(left, tuple(coordinates), tuple(columns) if blocks else (), tuple(right))
    return update, BCDReport(tuple(history))


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
        return self.u_expert[self.expert[tokens]].mT @ self.inner[tokens, :, inner]

    def to(self, device: torch.device | str) -> FactoredCore:
        """The same core on another device."""
        return FactoredCore(*(part.to(device) for part in (self.left, self.expert, self.inner, self.u_expert)))

    def dense(self) -> Tensor:
        """``G [re, ro, ri]``, in chunks of tokens."""
        tokens, _, width = self.inner.shape
        re = self.u_expert.shape[1]
        core = self.left.new_zeros(len(self.left), re * width)
        step = max(1, _CHUNK // (re * width))
        for start in range(0, tokens, step):
            chosen = slice(start, start + step)
            core.addmm_(self.left[:, chosen], self.features(chosen).flatten(1))
        return core.reshape(-1, re, width).transpose(0, 1).contiguous()


def _core_without_left(keys: RoutedKeys, basis: TuckerBasis, metric: Metric) -> FactoredCore:
    if not (torch.isfinite(keys.key).all() and torch.isfinite(keys.gate).all()):
        raise _keys_not_finite()
    u_in = basis.u_in.to(SYSTEM_DTYPE)
    inner = torch.zeros(*keys.expert.shape, u_in.shape[1], dtype=SYSTEM_DTYPE, device=u_in.device)
    for part in keys.design(SYSTEM_DTYPE):
        inner.view(-1, u_in.shape[1])[part.slots] = metric.apply(part.expert, part.z).T @ u_in
    return FactoredCore(inner.new_zeros(0, keys.num_tokens), keys.expert, inner, basis.u_expert.to(SYSTEM_DTYPE))


def core_features(keys: RoutedKeys, basis: TuckerBasis, metric: Metric) -> Tensor:
    """``phi_t = sum_j g_tj U_e[j] (x) (U_in^T M_j k_tj)`` as ``[T, re * ri]`` float64 (MoTE paper section 3.2)."""
    return _core_without_left(keys, basis, metric).features().flatten(1)


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
        for positions in _slots_by_expert(keys):
            rows, x = positions // slots, flat[positions]
            gram[rows[:, None], rows[None, :]] += x @ x.T
        return gram
    step = max(1, _CHUNK // max(1, tokens * core.u_expert.shape[1]))
    for start in range(0, width, step):
        phi = core.features(inner=slice(start, start + step)).flatten(1)
        gram.addmm_(phi, phi.T)
    return gram


def _slots_by_expert(keys: RoutedKeys) -> list[Tensor]:
    """Per expert that is hit, its positions among the T * K slots, padded ones left out."""
    flat = keys.expert.reshape(-1)
    order = torch.argsort(flat, stable=True)
    order = order[keys.gate.reshape(-1)[order] != 0]
    counts = torch.unique_consecutive(flat[order], return_counts=True)[1].tolist()
    return list(order.split(counts))


def solve_mote(
    keys: RoutedKeys,
    residual: Tensor,
    lambda_reg: float,
    metric: Metric,
    basis: TuckerBasis,
    form: str = "auto",
) -> FactoredCore | Tensor:
    """Ridge on the Tucker core (MoTE, arXiv 2605.16686), float64: factored from the dual, ``[re, ro, ri]`` from the
    primal form.

    ``G = argmin sum_t ||r_t - U_out G phi_t||^2 + lambda ||U_out G||^2``. ``form`` is "dual" (T x T), "primal"
    ((re ri) x (re ri)) or "auto", which takes the smaller. Neither form holds all of Phi ``[T, re ri]``.

    Raises:
        NumericalError, HyperParamsError: as in :func:`solve_exact`.
    """
    _check_lambda(lambda_reg)
    wanted, core = _wanted(residual), _core_without_left(keys, basis, metric)
    re, ri = basis.u_expert.shape[1], basis.u_in.shape[1]
    reduced = basis.coordinates(wanted.T).T
    if _form(form, keys.num_tokens, re * ri, lambda_reg) == "dual":
        left = _solve_factored(_factor_ridge_(_core_gram(core, keys), lambda_reg), reduced).T.contiguous()
        return replace(core, left=left)
    gram, moved = wanted.new_zeros(re * ri, re * ri), wanted.new_zeros(re * ri, reduced.shape[1])
    step = max(1, _CHUNK // (re * ri))
    for start in range(0, keys.num_tokens, step):
        phi = core.features(slice(start, start + step)).flatten(1)
        gram.addmm_(phi.T, phi)
        moved.addmm_(phi.T, reduced[start : start + step])
    dense = _solve_factored(_factor_ridge_(gram, lambda_reg), moved).T
    return dense.reshape(-1, re, ri).transpose(0, 1).contiguous()


def solve_core(
    keys: RoutedKeys,
    residual: Tensor,
    lambda_reg: float,
    metric: Metric,
    basis: TuckerBasis,
    form: str = "auto",
) -> Tensor:
    """The core of :func:`solve_mote` as a dense ``[re, ro, ri]``: for tests and small problems only."""
    core = solve_mote(keys, residual, lambda_reg, metric, basis, form)
    return core if isinstance(core, Tensor) else core.dense()


def expand_core(core: FactoredCore | Tensor, basis: TuckerBasis, metric: Metric) -> FactoredUpdate:
    """``Delta_j = U_out (sum_a U_e[j,a] G_a) U_in^T M_j`` for one layer's basis and metric.

    A factored core of T tokens gives ``left = U_out a [d, T]`` and, per expert, ``right = M_j U_in y_j`` with
    ``y_j [ri, T] = sum_k (U_e U_e'^T)[j, j_tk] x_tk``; in the basis that it was solved in, and with all expert
    directions kept, only the T_j tokens of an expert have a part in it. Else ``left = U_out``.
    """
    u_e, u_in, u_out = (u.to(SYSTEM_DTYPE) for u in (basis.u_expert, basis.u_in, basis.u_out))
    core = core.to(u_e.device)  # it may come from a layer on another device
    if isinstance(core, FactoredCore):
        mix = u_e @ core.u_expert.T
        same = mix.shape[0] == mix.shape[1] and torch.allclose(mix, torch.eye(len(mix)).to(mix), rtol=0, atol=1e-10)
        if same:
            return _expand_own_tokens(core, u_in, u_out, metric)
        if len(core.inner) <= u_out.shape[1]:
            return _expand_all_tokens(core, mix, u_in, u_out, metric)
        core = core.dense()
    columns = torch.arange(core.shape[1], device=core.device)
    right = []
    for expert in range(u_e.shape[0]):
        mixed = torch.einsum("a,aoi->oi", u_e[expert], core)
        right.append(metric.apply(expert, u_in @ mixed.T))
    experts = tuple(range(u_e.shape[0]))
    return FactoredUpdate(u_out, experts, (columns,) * len(experts), tuple(right))


def _expand_own_tokens(core: FactoredCore, u_in: Tensor, u_out: Tensor, metric: Metric) -> FactoredUpdate:
    _, slots, width = core.inner.shape
    used = core.inner.any(2)
    experts, columns, right = [], [], []
    for positions in _slots_by_expert(RoutedKeys(core.expert, used, core.inner)):
        expert = int(core.expert.reshape(-1)[positions[0]])
        experts.append(expert)
        columns.append(positions // slots)
        right.append(metric.apply(expert, u_in @ core.inner.reshape(-1, width)[positions].T))
    return FactoredUpdate(u_out @ core.left, tuple(experts), tuple(columns), tuple(right))


def _expand_all_tokens(core: FactoredCore, mix: Tensor, u_in: Tensor, u_out: Tensor, metric: Metric) -> FactoredUpdate:
    tokens, _, width = core.inner.shape
    columns = torch.arange(tokens, device=mix.device)
    step, right = max(1, _CHUNK // max(1, tokens * width)), []
    for start in range(0, len(mix), step):
        weights = mix[start : start + step][:, core.expert].movedim(0, 1)  # [T, experts, K]
        for offset, y in enumerate((weights @ core.inner).unbind(1)):
            right.append(metric.apply(start + offset, u_in @ y.T))
    return FactoredUpdate(u_out @ core.left, tuple(range(len(mix))), (columns,) * len(mix), tuple(right))


def objective(keys: RoutedKeys, residual: Tensor, lambda_reg: float, metric: Metric, update: FactoredUpdate) -> float:
    """The objective at ``Delta_j = B_j V_j^T`` of any solver here, whose V_j lie in the range of M_j."""
    left = residual.to(SYSTEM_DTYPE) - update.apply(keys)
    total = float((left**2).sum())
    for expert, columns, right in zip(update.experts, update.columns, update.right, strict=True):
        b = update.left[:, columns]
        total += lambda_reg * float((b * (b @ (right.T @ metric.inverse(expert, right)))).sum())
    return total
