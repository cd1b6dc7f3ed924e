"""How many directions of a spectrum are kept: by number, by fraction or by energy (pure, torch only)."""

from __future__ import annotations

import torch
from torch import Tensor

from easyedit_moe.errors import HyperParamsError


def resolve_rank(rank: int | float, size: int, name: str) -> int:
    """A rank given as an int (1..size) or as a fraction in (0, 1] of ``size``.

    Raises:
        HyperParamsError: out of range.
    """
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise HyperParamsError(f"{name} must be an int or a fraction; found {rank!r}.")
    if isinstance(rank, float):
        if not 0 < rank <= 1:
            raise HyperParamsError(f"{name} as a fraction must lie in (0, 1]; found {rank}.")
        return max(1, round(rank * size))
    if not 1 <= rank <= size:
        raise HyperParamsError(f"{name} must lie in 1..{size}, the size of that mode; found {rank}.")
    return rank


def leading_directions(values: Tensor, energy: float) -> int:
    """The fewest leading eigenvalues that sum up to at least ``energy`` of all; 0 where all are 0.

    Args:
        values: ``[n]``, eigenvalues in decreasing order; negative ones, which are rounding, count as 0.
        energy: share in (0, 1].
    """
    return leading_directions_of(values[None], energy)[0]


def leading_directions_of(values: Tensor, energy: float) -> list[int]:
    """`leading_directions` of each of several spectra ``[c, n]``, read from their device at once."""
    if values.numel() == 0:
        return [0] * len(values)
    held = values.clamp_min(0).cumsum(1)
    # At energy 1 rounding of the sum must not ask for directions that hold nothing.
    count = (held < energy * held[:, -1:] * (1 - 1e-12)).sum(1) + 1
    return torch.where(held[:, -1] > 0, count, 0).tolist()
