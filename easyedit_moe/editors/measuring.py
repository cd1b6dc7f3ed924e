"""Measuring what an edit did: how far weights and hidden states moved, and how well a solution fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from easyedit_moe.algebra.core_update import Update
from easyedit_moe.algebra.routed_keys import RoutedKeys
from easyedit_moe.moe.layers import MoELayerView


@dataclass(frozen=True)
class Fit:
    """What solutions move (F) beside what was wanted of them (R), in squared norms; fits of groups add up.

    Attributes:
        wanted: ``||R||^2``.
        along: ``<F, R>``.
        moved: ``||F||^2``.
    """

    wanted: float = 0.0
    along: float = 0.0
    moved: float = 0.0

    @staticmethod
    def of(update: Update, keys: RoutedKeys, residual: Tensor) -> Fit:
        """Of one solution, for T keys and residuals ``[T, d]``."""
        update = update.to(device=keys.key.device)
        moved = update.apply(keys)
        wanted = residual.to(moved)
        inner = torch.stack([(wanted * wanted).sum(), (moved * wanted).sum(), (moved * moved).sum()])
        return Fit(*inner.tolist())

    def __add__(self, other: Fit) -> Fit:
        return Fit(self.wanted + other.wanted, self.along + other.along, self.moved + other.moved)

    @property
    def share(self) -> float | None:
        """Share of the residual that is made up for; None where none was wanted."""
        return self.along / self.wanted if self.wanted else None

    @property
    def shrinkage(self) -> float | None:
        """``1 - ||F||^2 / <F, R>``; None where the solution does not help."""
        return 1 - self.moved / self.along if self.along > 0 else None


def residual_shares(before: Tensor, after: Tensor, wanted: Tensor, per_fact: int) -> list[float | None]:
    """Per fact, the mean over its contexts of ``<after - before, wanted> / ||wanted||^2``; None where that is 0 / 0.

    Args:
        before: hidden states ``[T, d]`` float32, the ``per_fact`` contexts of a fact side by side.
        after: the same of the edited model.
        wanted: the residuals that were wanted, ``[T, d]``.
        per_fact: contexts of each fact.
    """
    wanted = wanted.to(after.device, torch.float64)
    along = ((after.to(torch.float64) - before.to(torch.float64)) * wanted).sum(1).view(-1, per_fact).sum(1)
    length = wanted.square().sum(1).view(-1, per_fact).sum(1)
    pairs = zip(along.tolist(), length.tolist(), strict=True)
    return [part / whole if whole else None for part, whole in pairs]


def relative_updates(
    view: MoELayerView, originals: Mapping[int, Mapping[int, Tensor]]
) -> dict[int, dict[int, float | None]]:
    """Layer -> expert -> ``||W' - W|| / ||W||`` of its down-projection as it is now; None where W is zero."""
    found: dict[int, dict[int, float | None]] = {}
    for layer, experts in originals.items():
        norms = [_norms(view.layers[layer].experts.read(expert), original) for expert, original in experts.items()]
        pairs = torch.stack(norms).tolist() if norms else []
        shares = [moved / size if size else None for moved, size in pairs]
        found[layer] = dict(zip(experts, shares, strict=True))
    return found


def relative_update(now: Tensor, original: Tensor) -> float | None:
    """``||W' - W|| / ||W||`` of one tensor; None where W is zero."""
    moved, size = _norms(now, original).tolist()
    return moved / size if size else None


def _norms(now: Tensor, original: Tensor) -> Tensor:
    """Norms of the change and of the original."""
    dtype = torch.float64 if original.dtype == torch.float64 else torch.float32
    before = original.detach().to(now.device, dtype)
    return torch.stack([(now.detach().to(dtype) - before).norm(), before.norm()])


def combined_loss(writes: Sequence[tuple[float, float]]) -> float | None:
    """The rounding loss of several writes together, from the loss and the norm of each; None without writes."""
    if not writes:
        return None
    total = sum(norm**2 for _, norm in writes)
    return (sum((loss * norm) ** 2 for loss, norm in writes) / total) ** 0.5 if total else 0.0
