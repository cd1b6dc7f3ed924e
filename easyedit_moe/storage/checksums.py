"""Checksums of weights, by which changes are seen; the same on every device and however the weights are stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

TILE_BYTES = 2**23
"""Of the tensors that are copied side by side, so that the copy of small ones stays in a CPU's cache."""


def checksum(weight: Tensor) -> int:
    """Sum modulo 2^64 of the bits, 64 at a time, each times an odd weight of its own: any one change is seen.

    The bits are taken row by row of ``weight`` as it is indexed, so a view, a transposed view, a slice of a packed
    parameter and a copy of it on another device have one checksum. The weight of row i and column j of a table of R
    rows is ``(2 i + 1) + 2 R j``, so sums by row and by column do.
    """
    return checksums(weight[None])[0]


def checksums(weights: Tensor) -> list[int]:
    """`checksum` of each of ``weights [E, ...]``, in one pass.

    A tensor that is not contiguous is copied; where that is too much at once, take a few of them at a time.
    """
    return [int(value) for value in _sums(weights).tolist()]


def checksums_of(weights: Sequence[Tensor]) -> list[int]:
    """`checksum` of each of several tensors of any shapes: those that are alike together, read from a device at once.

    Tensors of one shape, dtype and device are copied side by side, at most ``TILE_BYTES`` at a time.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for number, weight in enumerate(weights):
        alike.setdefault((weight.shape, weight.dtype, weight.device), []).append(number)
    places: dict[torch.device, list[int]] = {}
    sums: dict[torch.device, list[Tensor]] = {}
    for (_, _, device), numbers in alike.items():
        most = max(1, TILE_BYTES // max(1, weights[numbers[0]].nbytes))
        for start in range(0, len(numbers), most):
            some = numbers[start : start + most]
            tile = weights[some[0]][None] if len(some) == 1 else torch.stack([weights[n].detach() for n in some])
            places.setdefault(device, []).extend(some)
            sums.setdefault(device, []).append(_sums(tile))
    found = [0] * len(weights)
    for device, numbers in places.items():
        for number, value in zip(numbers, torch.cat(sums[device]).tolist(), strict=True):
            found[number] = int(value)
    return found


def _sums(weights: Tensor) -> Tensor:
    """As `checksums`, ``[E]`` int64 where the weights are."""
    count = len(weights)
    if not weights.numel():
        return torch.zeros(count, dtype=torch.int64, device=weights.device)
    flat = weights.detach().contiguous().view(count, -1)
    width = 8 // flat.element_size()
    if flat.shape[1] % width:
        flat = torch.nn.functional.pad(flat, (0, width - flat.shape[1] % width))
    # A slice of a parameter may begin anywhere, but 64 bits at a time are read from multiples of 64 bits.
    words = (flat.clone() if flat.storage_offset() % width else flat).view(-1).view(torch.int64).view(count, -1)
    number = words.shape[1]
    side = max(1, math.isqrt(number))
    whole = number // side * side
    table, rest = words[:, :whole].unflatten(1, (-1, side)), words[:, whole:]
    step = 2 * table.shape[1]
    odd = torch.arange(1, step, 2, device=words.device)
    even = torch.arange(side, device=words.device) * step
    last = torch.arange(rest.shape[1], device=words.device) * 2 + step * side + 1
    return (table.sum(2) * odd).sum(1) + (table.sum(1) * even).sum(1) + (rest * last).sum(1)
