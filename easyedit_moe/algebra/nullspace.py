"""From second moments of preserved keys to per-expert projectors (pure, torch only)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from easyedit_moe.algebra.ranks import leading_directions_of, resolve_rank
from easyedit_moe.errors import HyperParamsError, NumericalError

CHUNK = 2**25
"""Numbers in the moments that are decomposed together (256 MB in float64)."""

LOW_COVERAGE = ("keep", "identity", "pooled", "frozen")
"""What becomes of an expert that fewer than ``min_count`` tokens reached.

``keep``: its own moment is used; only the directions that were seen are protected.
``identity``: no direction is protected. ``frozen``: the expert is never edited.
``pooled``: the moment pooled over all experts, weighted by their counts, stands in for its own.
"""


@dataclass(frozen=True)
class ExpertProjector:
    """``P = U U^T``, or ``P = I - U U^T`` if ``complement``; ``basis`` U is the cheaper side, ``[h, r]``."""

    basis: Tensor
    complement: bool

    def __call__(self, x: Tensor) -> Tensor:
        """``P x`` for ``x [h, n]``, in x's dtype."""
        u = self.basis.to(device=x.device, dtype=x.dtype)
        projected = u @ (u.T @ x)
        return x - projected if self.complement else projected

    def root(self, x: Tensor) -> Tensor:
        """``N x`` with ``P = N^T N``: ``U^T x [r, n]``, or ``P x [h, n]`` if ``complement``."""
        return self(x) if self.complement else self.basis.to(device=x.device, dtype=x.dtype).T @ x

    def lift(self, y: Tensor) -> Tensor:
        """``N^T y`` for combinations y of what `root` returned, so that ``lift(root(x)) = P x``."""
        return y if self.complement else self.basis.to(device=y.device, dtype=y.dtype) @ y

    @property
    def rank(self) -> int:
        """Dimension of the space that edits may use."""
        h, r = self.basis.shape
        return h - r if self.complement else r


@dataclass(frozen=True)
class NullSpace:
    """Projectors of all experts of one layer; a metric ``M_j = P_j`` for the solvers."""

    projectors: tuple[ExpertProjector, ...]

    def apply(self, expert: int, x: Tensor) -> Tensor:
        """``P_j x`` for ``x [h, n]``."""
        return self.projectors[expert](x)

    def root(self, expert: int, x: Tensor) -> Tensor:
        """See `ExpertProjector.root`."""
        return self.projectors[expert].root(x)

    def lift(self, expert: int, y: Tensor) -> Tensor:
        """See `ExpertProjector.lift`."""
        return self.projectors[expert].lift(y)

    def inverse(self, expert: int, x: Tensor) -> Tensor:
        """``x`` itself: on its range a projector is its own pseudo-inverse."""
        return x

    @property
    def ranks(self) -> list[int]:
        """Per expert, the dimension of its null space."""
        return [p.rank for p in self.projectors]


def pooled_moment(moments: Tensor, counts: Tensor) -> Tensor:
    """Count-weighted mean ``[h, h]`` of the normalised moments ``[E, h, h]``, in float64."""
    weights = counts.to(torch.float64)
    if weights.sum() == 0:
        raise NumericalError("No token reached any expert: there are no statistics to pool. Use a larger corpus.")
    return torch.einsum("e,eij->ij", weights / weights.sum(), moments.to(torch.float64))


def resolve_coverage(moments: Tensor, counts: Tensor, min_count: int, low_coverage: str) -> list[Tensor | str]:
    """Per expert its moment ``[h, h]`` float64, or ``"identity"`` or ``"frozen"``, after the explicit choice."""
    if low_coverage not in LOW_COVERAGE:
        raise HyperParamsError(f"low_coverage must be one of {', '.join(LOW_COVERAGE)}; found {low_coverage!r}.")
    if not torch.isfinite(moments).all():
        raise NumericalError("The second moments hold NaN or infinity. Delete this layer's cache and collect anew.")
    pooled = pooled_moment(moments, counts) if low_coverage == "pooled" else None
    resolved: list[Tensor | str] = []
    for moment, count in zip(moments, counts.tolist(), strict=True):
        if count >= min_count or low_coverage == "keep":
            resolved.append(moment.to(torch.float64))
        elif pooled is not None:
            resolved.append(pooled)
        else:
            resolved.append(low_coverage)
    return resolved


def null_space(
    moments: Tensor,
    counts: Tensor,
    threshold: float | None,
    relative: bool = False,
    min_count: int = 0,
    low_coverage: str = "keep",
    energy: float | None = None,
    rank: int | float | None = None,
) -> NullSpace:
    """Projectors on the trailing eigenvectors of each ``C_j``: those with eigenvalues <= threshold (MoEEdit,
    AlphaEdit), or, instead, those that an energy or a rank leaves. Of the three, one is given.

    Args:
        moments: ``[E, h, h]``, ``C_j = (1/n_j) sum k k^T``, any float dtype; eigh runs in float64.
        counts: ``[E]``, tokens that reached each expert.
        threshold: absolute (papers: 0.02), or a share of each expert's largest eigenvalue if ``relative``.
        relative: whether ``threshold`` is such a share.
        min_count: tokens below which an expert counts as thinly covered.
        low_coverage: what becomes of such an expert, see `LOW_COVERAGE`.
        energy: share of the trace in (0, 1]; the fewest leading directions that hold it are protected. An expert
            whose moment is 0 has nothing to protect.
        rank: dimension of each null space, an int in 1..h or a fraction in (0, 1] of h.

    Raises:
        NumericalError: moments that are not finite, or an eigendecomposition that fails.
        HyperParamsError: a negative threshold, a relative one above 1, an energy or rank out of range, none or several
            of them, or an unknown ``low_coverage``.
    """
    if sum(given is not None for given in (threshold, energy, rank)) != 1:
        raise HyperParamsError("Give one of nullspace_threshold, nullspace_energy and nullspace_rank.")
    if threshold is not None and (not threshold >= 0 or (relative and threshold > 1)):
        raise HyperParamsError(f"nullspace_threshold must be >= 0, and <= 1 where it is relative; found {threshold}.")
    if energy is not None and not 0 < energy <= 1:
        raise HyperParamsError(f"nullspace_energy must lie in (0, 1]; found {energy}.")
    size = moments.shape[-1]
    wanted = None if rank is None else resolve_rank(rank, size, "nullspace_rank")
    resolved = resolve_coverage(moments, counts, min_count, low_coverage)
    nothing = torch.zeros(size, 0, dtype=torch.float64, device=moments.device)
    found = {
        expert: ExpertProjector(nothing, complement=moment == "identity")
        for expert, moment in enumerate(resolved)
        if isinstance(moment, str)
    }
    own = [expert for expert in range(len(resolved)) if expert not in found]
    step = max(1, CHUNK // size**2)
    # Each chunk waits for its eigenvalues: those of all experts at once would take more memory than there may be.
    for chunk in (own[start : start + step] for start in range(0, len(own), step)):
        values, vectors = _decomposed({expert: resolved[expert] for expert in chunk})
        if wanted is not None:
            free = [wanted] * len(chunk)
        elif energy is not None:
            free = [size - count for count in leading_directions_of(values.flip(1), energy)]
        else:
            limit = values[:, -1:].clamp_min(0) if relative else torch.ones_like(values[:, -1:])
            free = (values <= (threshold or 0.0) * limit).sum(1).tolist()
        for expert, number, basis in zip(chunk, free, vectors, strict=True):
            few = number <= size - number
            found[expert] = ExpertProjector((basis[:, :number] if few else basis[:, number:]).clone(), not few)
    return NullSpace(tuple(found[expert] for expert in range(len(resolved))))


def _decomposed(moments: dict[int, Tensor | str]) -> tuple[Tensor, Tensor]:
    """Eigenvalues and -vectors of several experts' moments, in one call; where that fails, one by one, to say whose."""
    parts = {expert: moment for expert, moment in moments.items() if isinstance(moment, Tensor)}
    try:
        values, vectors = torch.linalg.eigh(torch.stack(list(parts.values())))
    except torch.linalg.LinAlgError:
        found = []
        for expert, moment in parts.items():
            try:
                found.append(torch.linalg.eigh(moment))
            except torch.linalg.LinAlgError as error:
                raise NumericalError(f"Eigendecomposition of expert {expert}'s moment failed: {error}") from error
        values, vectors = (torch.stack(some) for some in zip(*found, strict=True))
    return values, vectors
