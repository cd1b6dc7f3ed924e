"""Checksums of weights, by which changes are seen; the same on every device."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def checksum(weight: Tensor) -> int:
    """Sum modulo 2^64 of the bits, 64 at a time, each times an odd weight of its own: any one change is seen.

    The weight of row i and column j of a table of R rows is ``(2 i + 1) + 2 R j``, so sums by row and by column do.
    """
    if not weight.is_contiguous() and weight.mT.is_contiguous():
        weight = weight.mT
    flat = weight.contiguous().view(-1)
    width = 8 // flat.element_size()
    if flat.numel() % width:
        flat = torch.nn.functional.pad(flat, (0, width - flat.numel() % width))
    words = flat.view(torch.int64)
    if not len(words):
        return 0
    side = max(1, math.isqrt(len(words)))
    whole = len(words) // side * side
    table, rest = words[:whole].view(-1, side), words[whole:]
    step = 2 * len(table)
    odd = torch.arange(1, step, 2, device=words.device)
    even = torch.arange(side, device=words.device) * step
    last = torch.arange(len(rest), device=words.device) * 2 + step * side + 1
    return int((table.sum(1) * odd).sum() + (table.sum(0) * even).sum() + (rest * last).sum())
