"""A patch as one pair of low-rank factors per expert: what an adapter for serving holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from easyedit_moe.algebra.low_rank import low_rank, rounded_difference
from easyedit_moe.algebra.routed_keys import FactoredUpdate
from easyedit_moe.errors import NumericalError, PatchError
from easyedit_moe.patches.inspection import expert_factors
from easyedit_moe.patches.stored import StoredExperts
from easyedit_moe.patches.weights import WeightPatch


@dataclass(frozen=True)
class LayerFactors:
    """The update of one layer's down-projections ``W_j [d, h]`` as ``b_j @ a_j``.

    Attributes:
        layer: index of the layer.
        stored: where its down-projections lie in the model.
        experts: expert -> ``b [d, s_j]`` and ``a [s_j, h]``, in the dtype of the adapter, on the CPU.
        exact_rank: largest rank of an expert's update before any was cut off.
        loss: ``||update - adapter|| / ||update||`` over the layer: what the rank cut off, and the dtype rounded.
        d_model, d_hidden: d and h.
    """

    layer: int
    stored: StoredExperts
    experts: dict[int, tuple[Tensor, Tensor]]
    exact_rank: int
    loss: float
    d_model: int
    d_hidden: int

    @property
    def rank(self) -> int:
        """Largest rank among the experts."""
        return max(len(a) for _, a in self.experts.values())

    def update(self) -> FactoredUpdate:
        """The same update as a patch's step, in float32."""
        experts = tuple(sorted(self.experts))
        ranks = [len(self.experts[expert][1]) for expert in experts]
        columns = torch.split(torch.arange(sum(ranks)), ranks)
        left = torch.cat([self.experts[expert][0] for expert in experts], dim=1).float()
        return FactoredUpdate(left, experts, columns, tuple(self.experts[e][1].T.float() for e in experts))


@dataclass
class _Found:
    """What is known of a layer while its experts are gone through."""

    experts: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    exact_rank: int = 0
    lost: float = 0.0
    total: float = 0.0


def layer_factors(patch: WeightPatch, rank: int | None = None, dtype: torch.dtype | None = None) -> list[LayerFactors]:
    """The update of every layer that a patch touches, of the exact rank or cut off at ``rank`` (truncated SVD).

    Several writes of one expert count as their sum. No dense update is computed. An expert whose update is zero is left
    out, a layer without any, too.

    Args:
        patch: applied or not.
        rank: the largest rank of an expert; None: the exact one.
        dtype: of the factors; None: that of each layer's down-projections.

    Raises:
        PatchError: nothing is left to serve, or ``rank`` is no positive number. NumericalError: an update that is not
            finite, or not in ``dtype``.
    """
    if rank is not None and rank < 1:
        raise PatchError(f"The rank must be at least 1; found {rank}.")
    found: dict[int, _Found] = {}
    sizes: dict[int, tuple[int, int]] = {}
    for layer, expert, left, right in expert_factors(patch):
        here = found.setdefault(layer, _Found())
        sizes[layer] = (len(left), len(right))
        exact_b, exact_a = low_rank(left, right)
        kind = dtype or getattr(torch, patch.dtypes[layer])
        b, a = exact_b[:, :rank].to(kind), exact_a[:rank].to(kind)
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise NumericalError(
                f"Layer {layer}, expert {expert}: the factors overflow {kind}. Export them in bfloat16 or float32."
            )
        here.exact_rank = max(here.exact_rank, len(exact_a))
        here.total += float(exact_b.square().sum(0).square().sum())  # column norms are roots of singular values
        here.lost += rounded_difference(exact_b, exact_a, b, a) ** 2
        if len(a) and bool(a.any()) and bool(b.any()):
            here.experts[expert] = (b, a)
    layers = [
        LayerFactors(n, patch.stored[n], one.experts, one.exact_rank, (one.lost / one.total) ** 0.5, *sizes[n])
        for n, one in found.items()
        if one.experts
    ]
    if not layers:
        raise PatchError(f"The patch {patch.id} changes nothing, so there is nothing to serve.")
    return layers


def padded(factors: LayerFactors, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``b [d, rank]`` and ``a [rank, h]`` of every expert of the layer, zeros where there is no update."""
    kind = next(iter(factors.experts.values()))[0].dtype
    for expert in range(factors.stored.experts):
        b, a = torch.zeros(factors.d_model, rank, dtype=kind), torch.zeros(rank, factors.d_hidden, dtype=kind)
        if expert in factors.experts:
            some_b, some_a = factors.experts[expert]
            b[:, : some_b.shape[1]], a[: len(some_a)] = some_b, some_a
        yield b, a
