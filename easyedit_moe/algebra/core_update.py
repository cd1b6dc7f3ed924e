"""An update as a Tucker core and what maps it back to a layer: expanded a few experts at a time (pure, torch only).

With fewer expert directions than experts every edit changes every expert, so its factors ``right_j [h, T]`` are as many
numbers as 128 experts' worth of a thin matrix. The core that they come from is what an edit is: T K ri + ro T numbers.
All else belongs to the layer and is the same for all of its edits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from easyedit_moe.algebra.core import FactoredCore
from easyedit_moe.algebra.metric import Metric
from easyedit_moe.algebra.nullspace import ExpertProjector, NullSpace
from easyedit_moe.algebra.routed_keys import FactoredUpdate, RoutedKeys
from easyedit_moe.algebra.systems import SYSTEM_DTYPE
from easyedit_moe.algebra.tucker import TuckerBasis


@dataclass(frozen=True, eq=False)
class TuckerFactors:
    """What maps cores back to one layer, ``Delta_j = U_out (sum_a U_e[j,a] G_a) U_in^T M_j``; one for all its edits.

    Attributes:
        expert: U_e ``[E, re]``.
        inner: U_in ``[h, ri]``.
        outer: U_out ``[d, ro]``.
        metric: the M_j. Projectors count as if their vectors were of the factors' dtype, as they lie in a file.
    """

    expert: Tensor
    inner: Tensor
    outer: Tensor
    metric: Metric

    @staticmethod
    def of(basis: TuckerBasis, metric: Metric, dtype: torch.dtype = torch.float32) -> TuckerFactors:
        """Those of a basis, rounded to ``dtype``; of the metric nothing is copied."""
        return TuckerFactors(basis.u_expert.to(dtype), basis.u_in.to(dtype), basis.u_out.to(dtype), metric)

    def project(self, expert: int, x: Tensor) -> Tensor:
        """``M_j x`` for ``x [h, n]``."""
        if not isinstance(self.metric, NullSpace):
            return self.metric.apply(expert, x)
        projector = self.metric.projectors[expert]
        return ExpertProjector(projector.basis.to(self.inner.dtype), projector.complement)(x)


@dataclass(frozen=True)
class CoreUpdate:
    """The update of all experts of a layer that a core means; arithmetic in float64, results in the factors' dtype.

    To what writes or reads an update it is one of `FactoredUpdate`'s kind: ``Delta_j = left @ right_j^T`` of rank
    ``min(T, ro)``, but ``right_j`` exists only while it is asked for.

    Attributes:
        core: of T tokens, or ``[re, ro, ri]``.
        factors: of the layer.
    """

    core: FactoredCore | Tensor
    factors: TuckerFactors

    @property
    def experts(self) -> tuple[int, ...]:
        """All of the layer."""
        return tuple(range(len(self.factors.expert)))

    @property
    def d_model(self) -> int:
        """Height d of the update."""
        return len(self.factors.outer)

    @property
    def d_hidden(self) -> int:
        """Width h."""
        return len(self.factors.inner)

    @property
    def device(self) -> torch.device:
        """Where the core lies, and all is computed."""
        return (self.core if isinstance(self.core, Tensor) else self.core.left).device

    @property
    def rank(self) -> int:
        """``min(T, ro)``."""
        wide = self.factors.outer.shape[1]
        return min(wide, self.core.left.shape[1]) if isinstance(self.core, FactoredCore) else wide

    @property
    def left(self) -> Tensor:
        """``[d, rank]``: ``U_out a`` of the tokens where these are no more than ro, else U_out; computed each time."""
        if isinstance(self.core, Tensor) or not self._of_tokens:
            return self.factors.outer.to(self.device)
        return self._returned(self._raised(self.factors.outer) @ self.core.left.to(SYSTEM_DTYPE))

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """Of every expert, all columns of ``left``."""
        return (torch.arange(self.rank, device=self.device),) * len(self.factors.expert)

    def rights(self, start: int, stop: int) -> list[Tensor]:
        """``right_j [h, rank]`` of the experts from ``start`` up to ``stop``: ``M_j U_in c_j^T``."""
        inner = self._raised(self.factors.inner)
        some = enumerate(self._coefficients(range(start, stop)), start)
        return [self._returned(self.factors.project(expert, inner @ own.T)) for expert, own in some]

    def _coefficients(self, experts: Sequence[int]) -> Iterator[Tensor]:
        """``c_j [rank, ri]`` with ``Delta_j = left c_j U_in^T M_j``, one expert at a time, so that its bits do not
        depend on which others are asked for.
        """
        u_expert = self._raised(self.factors.expert)
        if isinstance(self.core, Tensor):
            dense = self.core.to(SYSTEM_DTYPE)
            for expert in experts:
                yield torch.einsum("a,aoi->oi", u_expert[expert], dense)
            return
        source, inner, left = (t.to(SYSTEM_DTYPE) for t in (self.core.u_expert, self.core.inner, self.core.left))
        for expert in experts:
            weights = (source @ u_expert[expert])[self.core.expert]
            own = (weights.unsqueeze(1) @ inner).squeeze(1)
            yield own if self._of_tokens else left @ own

    @property
    def _of_tokens(self) -> bool:
        return isinstance(self.core, FactoredCore) and self.core.left.shape[1] <= self.factors.outer.shape[1]

    def _raised(self, factor: Tensor) -> Tensor:
        return factor.to(device=self.device, dtype=SYSTEM_DTYPE)

    def _returned(self, value: Tensor) -> Tensor:
        return value.to(self.factors.inner.dtype)

    def expanded(self) -> FactoredUpdate:
        """The same update with every expert's own factor: E h rank numbers."""
        right = self.rights(0, len(self.factors.expert))
        return FactoredUpdate(self.left, self.experts, self.columns, tuple(right))

    def dense(self, num_experts: int) -> Tensor:
        """``Delta`` as ``[E, d, h]``: for tests and small problems only."""
        return self.expanded().dense(num_experts)

    def scale(self, factor: float) -> CoreUpdate:
        """``factor * Delta``."""
        core = self.core
        return replace(self, core=core * factor if isinstance(core, Tensor) else replace(core, left=core.left * factor))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> CoreUpdate:
        """The core in another dtype or on another device; the layer's factors stay where they are."""
        if isinstance(self.core, Tensor):
            return replace(self, core=self.core.to(device=device, dtype=dtype))
        return replace(self, core=self.core.to(device, dtype))

    def is_finite(self) -> bool:
        """Whether the core is finite; the layer's factors are."""
        parts = (self.core,) if isinstance(self.core, Tensor) else (self.core.left, self.core.inner)
        return bool(torch.stack([torch.isfinite(part).all() for part in parts]).all())

    def apply(self, keys: RoutedKeys) -> Tensor:
        """``sum_j g_tj Delta_j k_tj`` as ``[T, d]`` float64; no ``right_j`` is computed for it."""
        left, inner = self.left.to(SYSTEM_DTYPE), self._raised(self.factors.inner)
        out = left.new_zeros(keys.num_tokens, len(left))
        design = keys.design(SYSTEM_DTYPE)
        for block, own in zip(design, self._coefficients([block.expert for block in design]), strict=True):
            moved = left @ (own @ (inner.T @ self.factors.project(block.expert, block.z)))
            out.index_add_(0, block.rows, moved.T)
        return out


Update = FactoredUpdate | CoreUpdate
"""What is written to one layer."""


def place_core(core: FactoredCore | Tensor, factors: TuckerFactors) -> Update:
    """``Delta_j = U_out (sum_a U_e[j,a] G_a) U_in^T M_j`` for one layer.

    In the basis that a core of T tokens was solved in, and with all expert directions kept, only the T_j tokens of an
    expert have a part in its update, which is then a `FactoredUpdate` of ``T K`` columns in the core's dtype.
    """
    core = core.to(factors.expert.device)  # it may come from a layer on another device
    if isinstance(core, FactoredCore) and _mixes_nothing(core, factors):
        return _own_tokens(core, factors)
    return CoreUpdate(core.smallest() if isinstance(core, FactoredCore) else core, factors)


def _mixes_nothing(core: FactoredCore, factors: TuckerFactors) -> bool:
    """Whether ``U_e U_e'^T`` is the identity, U_e' being the core's own expert factor."""
    square = factors.expert.shape[0] == factors.expert.shape[1]
    if not square or core.u_expert.shape != factors.expert.shape:
        return False
    mix = factors.expert.to(SYSTEM_DTYPE) @ core.u_expert.to(SYSTEM_DTYPE).T
    near = max(1e-10, 10 * torch.finfo(factors.expert.dtype).eps)
    return torch.allclose(mix, torch.eye(len(mix)).to(mix), rtol=0, atol=near)


def expand_core(core: FactoredCore | Tensor, basis: TuckerBasis, metric: Metric) -> FactoredUpdate:
    """`place_core` in float64, with every expert's own factor: for tests and small problems."""
    placed = place_core(core, TuckerFactors.of(basis, metric, SYSTEM_DTYPE))
    return placed if isinstance(placed, FactoredUpdate) else placed.expanded()


def _own_tokens(core: FactoredCore, factors: TuckerFactors) -> FactoredUpdate:
    u_in, u_out = factors.inner.to(core.inner.dtype), factors.outer.to(core.inner.dtype)
    _, slots, width = core.inner.shape
    experts, columns, right = [], [], []
    for expert, positions in RoutedKeys(core.expert, core.inner.any(2), core.inner).slots().items():
        experts.append(expert)
        columns.append(positions // slots)
        right.append(factors.project(expert, u_in @ core.inner.reshape(-1, width)[positions].T))
    return FactoredUpdate(u_out @ core.left, tuple(experts), tuple(columns), tuple(right))


def joined_cores(updates: Sequence[CoreUpdate]) -> CoreUpdate:
    """The sum of updates of one layer's factors, exact: the tokens of all of them, or one dense core where those would
    be more numbers.
    """
    factors, cores = updates[0].factors, [update.core for update in updates]
    if any(isinstance(core, Tensor) for core in cores):
        dense = [core if isinstance(core, Tensor) else core.dense() for core in cores]
        return CoreUpdate(torch.stack([core.to(dense[0]) for core in dense]).sum(0), factors)
    return CoreUpdate(FactoredCore.cat([core for core in cores if isinstance(core, FactoredCore)]).smallest(), factors)
