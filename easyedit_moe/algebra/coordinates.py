"""What a key means to a solver: its gated key for the exact solver, its part in the Tucker core for MoTE (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from easyedit_moe.algebra.metric import Metric
from easyedit_moe.algebra.routed_keys import ExpertDesign, RoutedKeys
from easyedit_moe.algebra.systems import SYSTEM_DTYPE, keys_not_finite
from easyedit_moe.algebra.tucker import TuckerBasis

Columns = dict[int, Tensor]
"""Expert -> ``[w, n]``, one column per token; experts that are not there have zeros."""


class Coordinates(Protocol):
    """How rows of a design are compared: a kernel between them, and the unknowns that they bear on.

    Attributes:
        size: N, the number of unknowns; so many rows are all that can differ.
    """

    @property
    def size(self) -> int:
        """N."""
        ...

    def encode(self, keys: RoutedKeys) -> RoutedKeys:
        """Rows ``x_tj [w]`` in place of the keys, float64, with gates of 1 and 0.

        Raises:
            NumericalError: keys or gates that are not finite.
        """
        ...

    def dual(self, columns: Columns) -> Columns:
        """``y_j`` with ``sum_j x_tj . y_j`` the kernel of rows and columns."""
        ...

    def features(self, rows: RoutedKeys) -> Tensor:
        """``[N, T]`` of encoded rows: their products are the kernel, too."""
        ...


def columns_of(rows: RoutedKeys) -> Columns:
    """Encoded rows as columns."""
    found = {}
    for part in rows.design(SYSTEM_DTYPE):
        found[part.expert] = part.z.new_zeros(part.z.shape[0], rows.num_tokens).index_add_(1, part.rows, part.z)
    return found


def kernel(design: list[ExpertDesign], count: int, dual: Mapping[int, Tensor]) -> Tensor:
    """``[count, n]`` of the rows whose design it is and the columns that were made ``dual``."""
    if not dual:
        return torch.zeros(count, 0, dtype=SYSTEM_DTYPE)
    like = next(iter(dual.values()))
    found = like.new_zeros(count, like.shape[1])
    for part in design:
        if part.expert in dual:
            found.index_add_(0, part.rows, part.z.T @ dual[part.expert])
    return found


def finite(keys: RoutedKeys) -> RoutedKeys:
    """The keys, or NumericalError where they are not finite."""
    if not (torch.isfinite(keys.key).all() and torch.isfinite(keys.gate).all()):
        raise keys_not_finite()
    return keys


@dataclass(frozen=True)
class ExpertCoordinates:
    """Of Global and BCD: ``x_tj = g_tj k_tj [h]``, ``y_j = M_j x_j``, unknowns in the roots of all experts.

    Attributes:
        metric: the M_j.
        num_experts: E.
        d_hidden: h.
    """

    metric: Metric
    num_experts: int
    d_hidden: int
    device: torch.device

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Rows n_j of each expert's root."""
        none = torch.zeros(self.d_hidden, 0, dtype=SYSTEM_DTYPE, device=self.device)
        return tuple(self.metric.root(expert, none).shape[0] for expert in range(self.num_experts))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each expert's unknowns begin."""
        return tuple(sum(self.sizes[:expert]) for expert in range(self.num_experts))

    @property
    def size(self) -> int:
        """``sum_j n_j``."""
        return sum(self.sizes)

    def encode(self, keys: RoutedKeys) -> RoutedKeys:
        """Gated keys."""
        gated = finite(keys).key.to(SYSTEM_DTYPE) * keys.gate.to(SYSTEM_DTYPE).unsqueeze(-1)
        return RoutedKeys(keys.expert, (keys.gate != 0).to(SYSTEM_DTYPE), gated)

    def dual(self, columns: Columns) -> Columns:
        """``M_j x_j``."""
        return {expert: self.metric.apply(expert, x) for expert, x in columns.items()}

    def features(self, rows: RoutedKeys) -> Tensor:
        """Roots ``N_j x_tj``, those of all experts below one another."""
        found = torch.zeros(self.size, rows.num_tokens, dtype=SYSTEM_DTYPE, device=rows.key.device)
        for part in rows.design(SYSTEM_DTYPE):
            block = self.block(found, part.expert)
            block.index_add_(1, part.rows, self.metric.root(part.expert, part.z))
        return found

    def block(self, features: Tensor, expert: int) -> Tensor:
        """``[n_j, ...]``, a view on one expert's unknowns."""
        return features[self.starts[expert] : self.starts[expert] + self.sizes[expert]]

    def lifted(self, features: Tensor) -> Columns:
        """``N_j^T f_j [h, n]`` of combinations of features, of every expert that has any."""
        blocks = {expert: self.block(features, expert) for expert in range(self.num_experts)}
        used = torch.stack([block.any() for block in blocks.values()]).tolist()
        return {j: self.metric.lift(j, blocks[j]) for j, has in zip(blocks, used, strict=True) if has}


@dataclass(frozen=True)
class CoreCoordinates:
    """Of MoTE: ``x_tj = U_in^T M_j g_tj k_tj [ri]``, ``y_j = sum_i (U_e U_e^T)_ji x_i``, unknowns are the core's.

    Attributes:
        basis: the layer's.
        metric: the M_j.
    """

    basis: TuckerBasis
    metric: Metric

    @cached_property
    def u_expert(self) -> Tensor:
        """``[E, re]`` in float64."""
        return self.basis.u_expert.to(SYSTEM_DTYPE)

    @property
    def width(self) -> int:
        """Ri."""
        return self.basis.u_in.shape[1]

    @property
    def size(self) -> int:
        """``re * ri``."""
        return self.u_expert.shape[1] * self.width

    def encode(self, keys: RoutedKeys) -> RoutedKeys:
        """The keys' inner coordinates."""
        u_in = self.basis.u_in.to(SYSTEM_DTYPE)
        inner = torch.zeros(*keys.expert.shape, self.width, dtype=SYSTEM_DTYPE, device=u_in.device)
        for part in finite(keys).design(SYSTEM_DTYPE):
            inner.view(-1, self.width)[part.slots] = self.metric.apply(part.expert, part.z).T @ u_in
        return RoutedKeys(keys.expert, (keys.gate != 0).to(SYSTEM_DTYPE), inner)

    def dual(self, columns: Columns) -> Columns:
        """Mixed over experts, as the expert factor has it."""
        if not columns:
            return {}
        index = list(columns)
        mixed = torch.einsum("ea,ja,jwn->ewn", self.u_expert, self.u_expert[index], torch.stack(list(columns.values())))
        return dict(enumerate(mixed))

    def features(self, rows: RoutedKeys) -> Tensor:
        """``phi_t = sum_j U_e[j] (x) x_tj``."""
        return (self.u_expert[rows.expert].mT @ rows.key).flatten(1).T
