"""The arithmetic of a write: an update added to experts in groups and tiles, rounded once.

Of a core (`easyedit_moe.algebra.core_update`) only the factors of one group of experts exist at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from easyedit_moe.algebra.core_update import Update
from easyedit_moe.errors import NumericalError
from easyedit_moe.moe.layers import MoELayer

_TILE = {"cpu": 400_000}
"""Numbers per tile of a write: on a CPU what its cache holds, elsewhere (`_LARGE_TILE`) enough to fill a GPU."""
_LARGE_TILE = 2**26


def tile_size(device: torch.device) -> int:
    """Numbers in one tile of a write; up to three tiles in float32 are its working memory."""
    return _TILE.get(device.type, _LARGE_TILE)


class Scratch:
    """Working memory of a write, used again for each group: new memory is paged in more slowly than it is used."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._kind: Any = None

    def take(self, like: Tensor, number: int, size: int) -> Tensor:
        """``[number, size]`` of the dtype and device of ``like``, with any content."""
        kind = (like.device, like.dtype)
        if self._memory is None or self._memory.numel() < number * size or self._kind != kind:
            self._memory = None  # what is given back first is not held beside what replaces it
            self._memory, self._kind = like.new_empty(number * size), kind
        return self._memory[: number * size].view(number, size)


@dataclass(frozen=True)
class Group:
    """Neighbouring experts whose update is one batched product ``left @ right`` in the orientation of the storage.

    Attributes:
        experts: their indices.
        weights: ``[c, rows, columns]``, a view on the parameter.
        left, right: ``[c, rows, r]`` and ``[c, r, columns]``, padded with zeros to the largest rank r.
        transposed: rows and columns are h and d rather than d and h.
    """

    experts: tuple[int, ...]
    weights: Tensor
    left: Tensor
    right: Tensor
    transposed: bool

    def add(self, scratch: Scratch, quick: bool) -> Tensor:
        """Write the sum; squared norm of what rounding lost, float64 on the weights' device.

        ``quick`` is for updates whose sum is exact enough in float32 (`sum_is_exact`).
        """
        dtype = torch.float64 if self.weights.dtype == torch.float64 else torch.float32
        left, right = self.left.to(dtype), self.right.to(dtype)
        count, rows, columns = self.weights.shape
        step = max(1, tile_size(left.device) // (count * columns))
        native = self.weights.dtype == dtype
        quick = quick and not native
        buffers = scratch.take(left, 2 if native else 3, count * min(step, rows) * columns)
        lost = torch.zeros((), dtype=torch.float64, device=left.device)
        for start in range(0, rows, step):
            tile, part = self.weights[:, start : start + step], left[:, start : start + step]
            first, second, *third = (buffer[: tile.numel()].view(tile.shape) for buffer in buffers)
            first.copy_(tile)
            # Conversions are copies of their own: mixed dtypes in one operation are slower on a CPU.
            if quick:
                tile.copy_(first.baddbmm_(part, right))
                error = first.sub_(second.copy_(tile))
            else:
                torch.bmm(part, right, out=second)
                if native:
                    after = tile.add_(second)
                else:
                    after = torch.add(first, second, out=third[0])
                    tile.copy_(after)
                    after.copy_(tile)
                error = first.sub_(after).add_(second)
            lost += torch.linalg.vector_norm(error).to(torch.float64) ** 2
        return lost

    def measures(self) -> Tensor:
        """``[2 c + 1]`` float64: ``||left @ right||^2`` of each expert, from r x r Gram matrices, ``||W_j||^2`` of each
        as it is now, and the root mean square of some weights.
        """
        left, right = self.left.to(torch.float64), self.right.to(torch.float64)
        updates = ((left.mT @ left) * (right @ right.mT)).sum((1, 2)).clamp_min(0)
        dtype = torch.float64 if self.weights.dtype == torch.float64 else torch.float32
        # One by one: on a CPU a reduction over all of a tensor is several times faster than one over some dimensions.
        norms = torch.stack([torch.linalg.vector_norm(weight, dtype=dtype) for weight in self.weights])
        some = self.weights[0, :16].float().square().mean().sqrt()
        return torch.cat([updates, norms.to(torch.float64).square(), some.to(torch.float64)[None]])

    def sum_is_exact(self, updates: Sequence[float], weight: float) -> bool:
        """Whether the float32 sum's own error, about eps / 4 of a weight, is below a thousandth of the update.

        ``updates`` are the experts' squared norms, ``weight`` is the size of some weights; see `measures`.
        """
        update = (sum(updates) / self.weights.numel()) ** 0.5
        return update > 250 * torch.finfo(torch.float32).eps * weight

    def not_finite(self, moe: MoELayer) -> NumericalError:
        """The error for weights that a sum made NaN or infinite."""
        bad = [expert for expert, w in zip(self.experts, self.weights, strict=True) if not torch.isfinite(w).all()]
        return NumericalError(
            f"Expert {(bad or self.experts)[0]} of layer {moe.index} would become NaN or infinite in "
            f"{self.weights.dtype}; nothing was kept of this edit. Raise lambda_reg, or load the model in bfloat16 or "
            "float32."
        )


@dataclass(frozen=True)
class Added:
    """What adding an update to a group did.

    Attributes:
        group: its weights are the new ones.
        updates, weights: squared norms of each expert's update, and of its matrix before.
        lost: squared norm of what rounding lost.
    """

    group: Group
    updates: tuple[float, ...]
    weights: tuple[float, ...]
    lost: float


def add_groups(moe: MoELayer, groups: Iterable[Group]) -> Iterator[Added]:
    """Write the sums of groups, in their order.

    What the CPU must know of them is read from the device twice per stretch of groups that together fill a tile there:
    a small layer has one stretch, however its experts are scattered.

    Raises:
        NumericalError: a weight that would not be finite; those of the stretch are written then.
    """
    scratch = Scratch()
    for stretch in _stretches(groups):
        numbers = torch.cat([group.measures() for group in stretch]).tolist()
        known: list[tuple[list[float], list[float]]] = []
        lost = []
        for group in stretch:
            count = len(group.experts)
            updates, weights, some = numbers[:count], numbers[count : 2 * count], numbers[2 * count]
            numbers = numbers[2 * count + 1 :]
            lost.append(group.add(scratch, group.sum_is_exact(updates, some)))
            known.append((updates, weights))
        # A weight that is not finite leaves no finite loss, so the weights are only searched where that happens.
        for group, (updates, weights), loss in zip(stretch, known, torch.stack(lost).tolist(), strict=True):
            if not math.isfinite(loss):
                raise group.not_finite(moe)
            yield Added(group, tuple(updates), tuple(weights), loss)


def _stretches(groups: Iterable[Group]) -> Iterator[list[Group]]:
    """Groups in a row of about as many weights as a tile has, or one that has more."""
    stretch: list[Group] = []
    size = 0
    for group in groups:
        if stretch and size + group.weights.numel() > tile_size(group.weights.device):
            yield stretch
            stretch, size = [], 0
        stretch.append(group)
        size += group.weights.numel()
    if stretch:
        yield stretch


def originals_of(moe: MoELayer, experts: list[int]) -> dict[int, Tensor]:
    """Copies of some experts' down-projections ``[d, h]``, in the orientation of the storage underneath.

    One allocation holds them all: the memory of many small ones is paged in 4 KiB at a time, which takes longer than
    the copying.
    """
    weights = [moe.experts.read(expert).detach() for expert in experts]
    if moe.experts.layout.transposed:
        weights = [weight.mT for weight in weights]
    if len({weight.device for weight in weights}) > 1:
        kept = [weight.clone() for weight in weights]
    else:
        kept = list(torch.stack(weights)) if weights else []
    if moe.experts.layout.transposed:
        kept = [weight.mT for weight in kept]
    return dict(zip(experts, kept, strict=True))


def groups_of(
    moe: MoELayer, update: Update, weights: Callable[[tuple[int, ...]], Tensor] | None = None
) -> Iterator[Group]:
    """The experts of an update in runs of neighbours, each small enough that its sum fits a tile where one can be.

    ``weights`` gives the matrices of a run ``[c, rows, columns]`` in the orientation of the storage; by default these
    are views on the layer's own.
    """
    layout, experts = moe.experts.layout, update.experts
    left, every = update.left, update.columns
    largest = max(layout.d_model * layout.d_hidden, update.rank * (layout.d_model + layout.d_hidden))
    most = max(1, tile_size(update.device) // largest) if layout.storage == "packed" else 1
    start = 0
    while start < len(experts):
        stop = start + 1
        while stop < len(experts) and stop - start < most and experts[stop] == experts[stop - 1] + 1:
            stop += 1
        run = experts[start:stop]
        lefts = [left[:, columns] for columns in every[start:stop]]
        rights = update.rights(start, stop)
        if layout.transposed:
            lefts, rights = rights, lefts
        stored = _stored(moe, run) if weights is None else weights(run)
        yield Group(run, stored, _padded(lefts), _padded(rights).mT, layout.transposed)
        start = stop


def _stored(moe: MoELayer, experts: tuple[int, ...]) -> Tensor:
    """The down-projections of a run as one view on the parameter."""
    parameter = moe.experts.parameters_of(experts[0])[1].data
    if moe.experts.layout.storage != "packed":
        return parameter[None]
    every = parameter if parameter.dim() == 3 else parameter.unflatten(0, (moe.experts.layout.num_experts, -1))
    return every[experts[0] : experts[-1] + 1]


def _padded(factors: list[Tensor]) -> Tensor:
    """``[c, n, r]`` of factors ``[n, r_j]``, filled up with zero columns."""
    if len(factors) == 1:
        return factors[0][None]
    rank = max(factor.shape[1] for factor in factors)
    return torch.stack([torch.nn.functional.pad(factor, (0, rank - factor.shape[1])) for factor in factors])
