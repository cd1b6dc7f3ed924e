"""Tucker bases of a stack of expert matrices: HOSVD, optional HOOI, optional whitening (pure, torch only)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from easyedit_moe.algebra.ranks import leading_directions, resolve_rank
from easyedit_moe.errors import HyperParamsError, NumericalError

WHITENING = ("none", "in", "out", "both")
METHODS = ("auto", "gram", "randomised")
CHUNK_NUMBERS = 2**25
"""Numbers in one chunk of a decomposition: 128 MB in float32."""


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


def _leading(gram: Tensor, rank: int | float) -> Tensor:
    """Eigenvectors of the ``rank`` largest eigenvalues, largest first; of as many as hold a fraction of their sum."""
    try:
        values, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError as error:
        raise NumericalError(f"Eigendecomposition of a mode's Gram matrix failed: {error}") from error
    count = rank if isinstance(rank, int) else max(1, leading_directions(values.flip(0), rank))
    return vectors[:, -count:].flip(1).contiguous()


class _Stack:
    """Expert matrices in chunks of the working dtype, each multiplied by ``s_in`` where that is given."""

    def __init__(self, weights: Tensor | Sequence[Tensor], s_in: Tensor | None, numbers: int) -> None:
        self.weights, self.numbers = weights, numbers
        self.shape = (len(weights), *weights[0].shape)
        self.dtype = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
        self.device = weights[0].device
        self.s_in = None if s_in is None else s_in.to(device=self.device, dtype=self.dtype)

    def experts(self, whiten: bool = True) -> Iterator[tuple[int, Tensor]]:
        """``(first expert, [c, d, h])``."""
        count, d, h = self.shape
        step = max(1, self.numbers // (d * h))
        for start in range(0, count, step):
            yield start, self._ready([self.weights[j] for j in range(start, min(start + step, count))], whiten)

    def rows(self) -> Iterator[Tensor]:
        """``[E, n, h]``: some rows of every expert."""
        count, d, h = self.shape
        step = max(1, self.numbers // (count * h))
        for start in range(0, d, step):
            yield self._ready([w[start : start + step] for w in self.weights], True)

    def _ready(self, parts: list[Tensor], whiten: bool) -> Tensor:
        out = torch.empty(len(parts), *parts[0].shape, dtype=self.dtype, device=self.device)
        for target, part in zip(out, parts, strict=True):
            target.copy_(part)
        return out @ self.s_in if whiten and self.s_in is not None else out


def _chunk_gram(chunk: Tensor, mode: int) -> Tensor:
    """Gram matrix of one mode of ``[n, d, h]``, float64 from products in the chunk's dtype."""
    flat = chunk.movedim(mode, 0).reshape(chunk.shape[mode], -1)
    return (flat @ flat.T).to(torch.float64)


def _stack_gram(stack: _Stack, mode: int) -> Tensor:
    """Gram matrix ``[n, n]`` float64 of one mode of the whole (whitened) stack.

    Raises:
        NumericalError: weights that are not finite.
    """
    if mode == 0:
        gram = _total(_chunk_gram(chunk, 0) for chunk in stack.rows())
    elif mode == 1:
        gram = _total(_chunk_gram(chunk, 1) for _, chunk in stack.experts())
    else:
        # (W S)^T (W S) = S^T (W^T W) S needs no whitened weights.
        gram = _total(_columns_gram(chunk) for _, chunk in stack.experts(whiten=False))
        if stack.s_in is not None:
            s = stack.s_in.to(torch.float64)
            gram = s.T @ gram @ s
    if not torch.isfinite(gram).all():
        raise NumericalError("The down-projections hold NaN or infinity; reload the model.")
    return gram


def _total(grams: Iterable[Tensor]) -> Tensor:
    """Sum of one or more Gram matrices."""
    return cast(Tensor, sum(grams))  # the int 0 only where there is none


def _columns_gram(chunk: Tensor) -> Tensor:
    flat = chunk.flatten(0, 1)
    return (flat.T @ flat).to(torch.float64)


OVERSAMPLING, POWER_ITERATIONS = 10, 2


def _wins_randomised(rank: int, size: int) -> bool:
    """Whether the range finder needs fewer operations than a Gram matrix: 4 n (k + p) per application against 2 n^2."""
    return 7 * (rank + OVERSAMPLING) < size


def _randomised_range(stack: _Stack, mode: int, rank: int) -> Tensor:
    """Leading ``rank`` directions of mode 1 or 2 by a randomised range finder (Halko, Martinsson and Tropp 2011,
    algorithms 4.4 and 5.3) with a fixed seed: 10 extra directions, 2 power iterations, Rayleigh-Ritz at the end.

    The error ``||W - its projection||`` stays within 1.005 times the truncated HOSVD's where singular values decay, and
    within 1.05 times where they hardly do (both tested); `TuckerBasis.relative_error` is that of the basis itself.
    """
    size = stack.shape[mode]
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(size, min(size, rank + OVERSAMPLING), generator=draw, dtype=torch.float64)
    q = q.to(stack.device)
    for _ in range(POWER_ITERATIONS + 1):
        y = torch.zeros_like(q)
        small = q.to(stack.dtype)
        for _, chunk in stack.experts():
            y += (chunk @ (chunk.mT @ small) if mode == 1 else chunk.mT @ (chunk @ small)).sum(0)
        if not torch.isfinite(y).all():
            raise NumericalError("The down-projections hold NaN or infinity; reload the model.")
        q = torch.linalg.qr(y).Q
    small, inner = q.to(stack.dtype), torch.zeros(q.shape[1], q.shape[1], dtype=torch.float64, device=q.device)
    for _, chunk in stack.experts():
        inner += _chunk_gram(small.T @ chunk, 1) if mode == 1 else _columns_gram(chunk @ small)
    return q @ _leading(inner, rank)


def _project(stack: _Stack, factors: list[Tensor], skip: int | None = None) -> Iterator[Tensor]:
    """The stack contracted with every factor's transpose except that of mode ``skip``, in chunks of the first mode; in
    one piece where that mode is contracted or its Gram matrix is wanted. Square factors only rotate and are left out.
    """
    u_expert, u_out, u_in = (
        None if mode == skip or factor.shape[0] == factor.shape[1] else factor.to(stack.dtype)
        for mode, factor in enumerate(factors)
    )
    parts: list[Tensor] = []
    whole: Tensor | None = None
    for start, chunk in stack.experts():
        chunk = chunk if u_out is None else u_out.T @ chunk
        chunk = chunk if u_in is None else chunk @ u_in
        if u_expert is not None:
            mixed = torch.tensordot(u_expert[start : start + len(chunk)], chunk, dims=([0], [0]))
            whole = mixed if whole is None else whole.add_(mixed)
        elif skip == 0:
            parts.append(chunk)
        else:
            yield chunk
    if parts:
        yield torch.cat(parts)
    if whole is not None:
        yield whole


def tucker_basis(
    weights: Tensor | Sequence[Tensor],
    rank_expert: int | float,
    rank_out: int | float,
    rank_in: int | float,
    hooi_sweeps: int = 0,
    whitening: str = "none",
    sigma_in: Tensor | None = None,
    sigma_out: Tensor | None = None,
    whitening_eps: float = 1e-5,
    method: str = "auto",
    chunk_numbers: int = CHUNK_NUMBERS,
    energy: Sequence[float] | None = None,
) -> TuckerBasis:
    """Truncated HOSVD of stacked down-projections by Gram matrices and eigh, refined by HOOI sweeps.

    The weights are read in chunks and never copied whole, except with whitening "out" or "both" (one copy in float32)
    and for sweeps that truncate the expert mode (one projected copy).

    Whitening "in" decomposes ``W_j S_in`` with ``S_in S_in^T = sigma_in + eps I`` and re-colours
    ``U_in = S_in^{-T} Ut_in``; "out" decomposes ``S_out^{-1} W_j`` and re-colours ``U_out = S_out Ut_out``, so that the
    decomposed matrix maps whitened inputs to whitened outputs (MoTE paper section 3.2, TD-MoE's recipe).

    Args:
        weights: ``[E, d, h]``, or E matrices ``[d, h]``; any float dtype; products in float32 or better, eigh in
            float64.
        rank_expert: re, an int or a fraction of E.
        rank_out: ro, an int or a fraction of d.
        rank_in: ri, an int or a fraction of h.
        hooi_sweeps: passes that refine all factors, >= 0.
        whitening: "none", "in", "out" or "both".
        sigma_in: ``[h, h]`` second moment of the keys, pooled over experts; for "in" and "both".
        sigma_out: ``[d, d]`` second moment of the MoE block's output; for "out" and "both".
        whitening_eps: what is added to the diagonal of the second moments, > 0.
        method: "gram", "randomised" (modes 1 and 2, see `_randomised_range` for its error), or "auto": the range
            finder for a rank below a seventh of its mode.
        chunk_numbers: numbers in one chunk, of which there are three at most.
        energy: instead of the ranks: per mode (expert, out, in) the share in (0, 1] of ``||Wt||^2`` that its factor
            keeps at least, with the fewest directions. By Gram matrices, whatever ``method``.

    Raises:
        HyperParamsError: rank, energy, sweeps, whitening, eps or method out of range. NumericalError: weights not
            finite.
    """
    _check_choices(whitening, hooi_sweeps, method)
    shape = (len(weights), *weights[0].shape)
    ranks = _resolved(shape, (rank_expert, rank_out, rank_in), energy)
    s_in, s_out = _whiteners(whitening, sigma_in, sigma_out, whitening_eps)
    stack = _whitened(weights, s_in, s_out, chunk_numbers)
    factors, error = _decomposed(stack, shape, ranks, hooi_sweeps, method)
    u_expert, u_out, u_in = factors
    if s_in is not None:
        u_in = torch.linalg.solve_triangular(s_in.T, u_in, upper=True)
    if s_out is not None:
        u_out = s_out @ u_out
    return TuckerBasis(u_expert, u_out, u_in, error)


def _whiteners(
    whitening: str, sigma_in: Tensor | None, sigma_out: Tensor | None, eps: float
) -> tuple[Tensor | None, Tensor | None]:
    """``S_in`` and ``S_out`` of a choice of whitening; None where it does not whiten."""
    s_in = s_out = None
    if whitening in ("in", "both"):
        s_in = whitening_factor(_required(sigma_in, "sigma_in", whitening), eps)
    if whitening in ("out", "both"):
        s_out = whitening_factor(_required(sigma_out, "sigma_out", whitening), eps)
    return s_in, s_out


def _whitened(
    weights: Tensor | Sequence[Tensor], s_in: Tensor | None, s_out: Tensor | None, chunk_numbers: int
) -> _Stack:
    """``S_out^{-1} W_j S_in``; only with S_out a copy of the weights."""
    stack = _Stack(weights, s_in, chunk_numbers)
    if s_out is None:
        return stack
    tensor = torch.cat([chunk for _, chunk in stack.experts()])
    return _Stack(torch.linalg.solve_triangular(s_out.to(tensor.dtype), tensor, upper=False), None, chunk_numbers)


def _resolved(
    shape: Sequence[int], ranks: Sequence[int | float], energy: Sequence[float] | None
) -> Sequence[int | float]:
    """Per mode its rank, an int, or the share of energy that chooses it, a float."""
    if energy is None:
        named = zip(ranks, shape, ("rank_expert", "rank_out", "rank_in"), strict=True)
        return [resolve_rank(rank, size, name) for rank, size, name in named]
    if len(energy) != 3 or not all(0 < share <= 1 for share in energy):
        raise HyperParamsError(f"tucker_energy must be three shares in (0, 1], one per mode; found {energy}.")
    return [float(share) for share in energy]


def _check_choices(whitening: str, hooi_sweeps: int, method: str) -> None:
    if whitening not in WHITENING:
        raise HyperParamsError(f"whitening must be one of {', '.join(WHITENING)}; found {whitening!r}.")
    if hooi_sweeps < 0:
        raise HyperParamsError(f"hooi_sweeps must be >= 0; found {hooi_sweeps}.")
    if method not in METHODS:
        raise HyperParamsError(f"method must be one of {', '.join(METHODS)}; found {method!r}.")


def _decomposed(
    stack: _Stack, shape: tuple[int, ...], ranks: Sequence[int | float], hooi_sweeps: int, method: str
) -> tuple[list[Tensor], float]:
    """Factors of the three modes, and the relative error of what they keep; a fractional rank is a share of energy."""
    factors, energies = [], []
    for mode, rank in enumerate(ranks):
        chosen = isinstance(rank, int) and mode > 0
        if chosen and (method == "randomised" or (method == "auto" and _wins_randomised(int(rank), shape[mode]))):
            factors.append(_randomised_range(stack, mode, int(rank)))
            continue
        gram = _stack_gram(stack, mode)
        factors.append(_leading(gram, rank))
        energies.append((mode, float(torch.trace(gram)), float((factors[mode] * (gram @ factors[mode])).sum())))
    for _ in range(hooi_sweeps):
        for mode, factor in enumerate(factors):
            gram = _total(_chunk_gram(chunk, mode) for chunk in _project(stack, factors, skip=mode))
            factors[mode] = _leading(gram, factor.shape[1])
    return factors, _relative_error(stack, factors, energies)


def _relative_error(stack: _Stack, factors: list[Tensor], energies: list[tuple[int, float, float]]) -> float:
    """``||W - its projection|| / ||W||`` from energies ``(mode, all of it, what the factor keeps)``, or measured."""
    total = energies[0][1]
    if total <= 0:
        return 0.0
    truncated = [mode for mode, factor in enumerate(factors) if factor.shape[0] != factor.shape[1]]
    if not truncated:
        return 0.0
    kept = next((kept for mode, _, kept in energies if truncated == [mode]), None)
    if kept is None:
        kept = sum(float(torch.linalg.vector_norm(c, dtype=torch.float64) ** 2) for c in _project(stack, factors))
    return (max(0.0, total - kept) / total) ** 0.5


def _required(sigma: Tensor | None, name: str, whitening: str) -> Tensor:
    if sigma is None:
        raise HyperParamsError(f"whitening '{whitening}' needs {name}; collect statistics first.")
    return sigma
