"""Earlier edits held in place at a bounded cost: rows with zero residual that a system is reduced by (pure).

A held row t asks that ``sum_j Delta_j g_tj k_tj`` stay small. It spans the experts its token was routed to, so second
moments of single experts do not say what is held; what does is the kernel of all held rows or, once there are more
rows than unknowns, their second moment over all unknowns together. With H the held rows and n the new ones, the system
of both has the solution of the new rows alone by

    S = K_nn - K_nH (K_HH + lambda I)^{-1} K_Hn    and the new columns    v = x_n - x_H (K_HH + lambda I)^{-1} K_Hn,

whose rank is that of the new rows. Inverses are updated row by row: a batch costs O(T^2) for T <= N held rows, O(N^2)
from then on, and N^2 numbers are kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from easyedit_moe.algebra.coordinates import Columns, Coordinates, columns_of, kernel
from easyedit_moe.algebra.routed_keys import RoutedKeys
from easyedit_moe.algebra.systems import SYSTEM_DTYPE, factor_ridge_

REFRESH = 512
"""Rows that come or go before inverses are computed anew, at least; rounding adds up until then."""

SMALLEST_RIDGE = 1e-7
"""Share of the rows' energy below which a ridge is too small for updated inverses: about 1e-16 / 1e-7 is lost."""


@dataclass(frozen=True)
class Reduced:
    """New rows in the presence of held ones.

    Attributes:
        gram: ``S [n, n]``, without the ridge.
        columns: v by expert, or None where they are ``features``.
        features: v as ``[N, n]``.
    """

    gram: Tensor
    columns: Columns | None = None
    features: Tensor | None = None


class Held(ABC):
    """Rows that are held, by name; `hold` says which they are from now on."""

    def __init__(self, coordinates: Coordinates) -> None:
        self.coordinates = coordinates
        self.rows: dict[Hashable, RoutedKeys] = {}
        self._changes = 0

    @property
    def num_rows(self) -> int:
        """Number T of held rows."""
        return sum(keys.num_tokens for keys in self.rows.values())

    def hold(self, wanted: Mapping[Any, RoutedKeys]) -> None:
        """Hold these rows and no others: new ones are taken in, others released.

        Raises:
            NumericalError: a row that is not finite, or a system that is singular.
        """
        gone = [name for name in self.rows if name not in wanted]
        # By name: of most rows, which are held already, nothing but the name is needed.
        new = {name: wanted[name] for name in wanted if name not in self.rows}
        moved = sum(self.rows[n].num_tokens for n in gone) + sum(keys.num_tokens for keys in new.values())
        changed = self._changes + moved
        if (changed > REFRESH and changed > self.num_rows // 2) or 2 * len(gone) > len(self.rows):
            self._begin(dict(wanted))
            self._changes = 0
            return
        if gone:
            self._release(gone)
        if new:
            self._absorb(new)
        self._changes = changed

    @abstractmethod
    def _begin(self, rows: dict[Hashable, RoutedKeys]) -> None: ...

    @abstractmethod
    def _release(self, names: list[Hashable]) -> None: ...

    @abstractmethod
    def _absorb(self, new: dict[Hashable, RoutedKeys]) -> None: ...


class HeldSystem(Held):
    """Held rows of the exact solver and of MoTE.

    Attributes:
        lambda_reg: of the system, > 0.
    """

    def __init__(self, coordinates: Coordinates, lambda_reg: float) -> None:
        super().__init__(coordinates)
        self.lambda_reg = lambda_reg
        self._encoded: RoutedKeys | None = None
        self._inverse: Tensor | None = None
        """``(K_HH + lambda I)^{-1} [T, T]``."""
        self._free: Tensor | None = None
        """``(I + Phi Phi^T / lambda)^{-1} [N, N]`` once there are more rows than unknowns."""

    @property
    def numbers(self) -> int:
        """Numbers that are kept of the held rows' system."""
        kept = self._inverse if self._free is None else self._free
        return 0 if kept is None else kept.numel()

    def reduce(self, keys: RoutedKeys) -> Reduced:
        """The new rows' system and columns."""
        rows = self.coordinates.encode(keys)
        if self._free is not None:
            moved = self._free @ (phi := self.coordinates.features(rows))
            return Reduced(_symmetric(phi.T @ moved), features=moved)
        columns = columns_of(rows)
        dual = self.coordinates.dual(columns)
        gram = kernel(rows.design(SYSTEM_DTYPE), rows.num_tokens, dual)
        if self._encoded is None or self._inverse is None:
            return Reduced(_symmetric(gram), columns)
        design = self._encoded.design(SYSTEM_DTYPE)
        cross = kernel(design, self._encoded.num_tokens, dual)
        weights = self._inverse @ cross
        for part in design:
            known = columns.get(part.expert)
            taken = part.z @ weights[part.rows]
            columns[part.expert] = -taken if known is None else known - taken
        return Reduced(_symmetric(gram - cross.T @ weights), dict(sorted(columns.items())))

    def _begin(self, rows: dict[Hashable, RoutedKeys]) -> None:
        self.rows, self._encoded, self._inverse, self._free = {}, None, None, None
        if rows:
            self._absorb(rows)

    def _absorb(self, new: dict[Hashable, RoutedKeys]) -> None:
        rows = self.coordinates.encode(RoutedKeys.cat(list(new.values())))
        self.rows |= new
        if self._free is not None:
            phi = self.coordinates.features(rows)
            moved = self._free @ phi
            self._free -= moved @ _inverse(phi.T @ moved, self.lambda_reg) @ moved.T
            return
        everything = rows if self._encoded is None else RoutedKeys.cat([self._encoded, rows])
        if everything.num_tokens > self.coordinates.size:
            # From the moment itself: made of the rows' inverse it would be a difference of large numbers.
            phi = self.coordinates.features(everything)
            self._free = self.lambda_reg * _inverse(phi @ phi.T, self.lambda_reg)
            self._encoded = self._inverse = None
            return
        dual = self.coordinates.dual(columns_of(rows))
        gram = kernel(rows.design(SYSTEM_DTYPE), rows.num_tokens, dual)
        if self._encoded is None or self._inverse is None:
            self._inverse = _inverse(gram, self.lambda_reg)
        else:
            cross = kernel(self._encoded.design(SYSTEM_DTYPE), self._encoded.num_tokens, dual)
            self._inverse = _bordered(self._inverse, cross, gram, self.lambda_reg)
        self._encoded = everything

    def _release(self, names: list[Hashable]) -> None:
        gone = [self.rows[name] for name in names]
        if self._free is not None:
            phi = self.coordinates.features(self.coordinates.encode(RoutedKeys.cat(gone)))
            moved = self._free @ phi
            rest = -_symmetric(phi.T @ moved)
            self._free += moved @ _inverse(rest, self.lambda_reg) @ moved.T
        elif self._encoded is not None and self._inverse is not None:
            keep, leave = self._places(set(names))
            some = self._inverse[keep]
            inner = torch.linalg.solve(self._inverse[leave][:, leave], some[:, leave].T)
            self._inverse = _symmetric(some[:, keep] - some[:, leave] @ inner)
            held = self._encoded
            self._encoded = RoutedKeys(held.expert[keep], held.gate[keep], held.key[keep])
        for name in names:
            del self.rows[name]

    def _places(self, names: set[Hashable]) -> tuple[Tensor, Tensor]:
        """Indices of the rows that stay and of those of ``names``."""
        marks: list[bool] = []
        for name, keys in self.rows.items():
            marks += [name in names] * keys.num_tokens
        gone = torch.tensor(marks, device=next(iter(self.rows.values())).key.device)
        return torch.nonzero(~gone).squeeze(1), torch.nonzero(gone).squeeze(1)


class HeldMoment(Held):
    """Held rows of BCD: their second moment ``Phi Phi^T [N, N]`` over all unknowns together."""

    def __init__(self, coordinates: Coordinates) -> None:
        super().__init__(coordinates)
        self.moment: Tensor | None = None

    def _begin(self, rows: dict[Hashable, RoutedKeys]) -> None:
        self.rows, self.moment = {}, None
        if rows:
            self._absorb(rows)

    def _absorb(self, new: dict[Hashable, RoutedKeys]) -> None:
        self._add(list(new.values()), 1)
        self.rows |= new

    def _release(self, names: list[Hashable]) -> None:
        self._add([self.rows.pop(name) for name in names], -1)

    def _add(self, keys: list[RoutedKeys], sign: int) -> None:
        phi = self.coordinates.features(self.coordinates.encode(RoutedKeys.cat(keys)))
        if self.moment is None:
            self.moment = phi.new_zeros(len(phi), len(phi))
        self.moment.addmm_(phi, phi.T, alpha=sign)


def ridge_suffices(keys: RoutedKeys, coordinates: Coordinates, lambda_reg: float) -> bool:
    """Whether updated inverses keep their digits with this ridge: it is not small beside the rows' energy."""
    rows = coordinates.encode(keys)
    dual = coordinates.dual(columns_of(rows))
    energy = float(torch.diagonal(kernel(rows.design(SYSTEM_DTYPE), rows.num_tokens, dual)).sum())
    return lambda_reg > SMALLEST_RIDGE * energy


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _inverse(gram: Tensor, lambda_reg: float) -> Tensor:
    """``(gram + lambda I)^{-1}``."""
    return torch.cholesky_inverse(factor_ridge_(_symmetric(gram).contiguous(), lambda_reg))


def _bordered(inverse: Tensor, cross: Tensor, gram: Tensor, lambda_reg: float) -> Tensor:
    """The inverse of a system that grows by ``cross [T, n]`` and ``gram + lambda I [n, n]``."""
    weights = inverse @ cross
    corner = _inverse(gram - cross.T @ weights, lambda_reg)
    side = weights @ corner
    old, new = len(inverse), len(corner)
    grown = inverse.new_empty(old + new, old + new)
    grown[:old, :old] = inverse + side @ weights.T
    grown[:old, old:] = -side
    grown[old:, :old] = -side.T
    grown[old:, old:] = corner
    return grown
