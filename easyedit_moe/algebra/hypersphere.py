"""Updates kept out of the principal directions of an expert's weights (SPHERE, arXiv 2510.01172; pure)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from easyedit_moe.algebra.ranks import leading_directions_of
from easyedit_moe.algebra.routed_keys import FactoredUpdate
from easyedit_moe.errors import HyperParamsError, NumericalError


def principal_directions(weight: Tensor, energy: float) -> Tensor:
    """``U [h, r]`` in float64: the fewest leading eigenvectors of ``(1/d) W^T W`` whose eigenvalues sum to a share.

    Args:
        weight: ``W [d, h]``, whose rows are the points on the hypersphere.
        energy: the share in (0, 1] (the paper's cumulative ratio eta).

    Raises:
        HyperParamsError: a share out of range. NumericalError: weights that are not finite.
    """
    return principal_directions_of(lambda _: weight, 1, energy)[0]


def principal_directions_of(read: Callable[[int], Tensor], count: int, energy: float) -> tuple[Tensor, ...]:
    """`principal_directions` of experts 0 to ``count - 1``, whose weights ``read`` returns; raises as there."""
    if not 0 < energy <= 1:
        raise HyperParamsError(f"sphere_energy must lie in (0, 1]; found {energy}.")
    if not torch.stack([torch.isfinite(read(expert)).all() for expert in range(count)]).all():
        raise NumericalError("An expert's weights hold NaN or infinity, so they have no principal directions.")
    found = []
    for expert in range(count):
        w = read(expert).to(torch.float64)
        # A decomposition says at once whether it failed, and several side by side would need the memory of several.
        found.append(torch.linalg.eigh(w.T @ w / w.shape[0]))
    kept = leading_directions_of(torch.stack([values.flip(0) for values, _ in found]), energy)
    return tuple(vectors[:, len(values) - number :] for (values, vectors), number in zip(found, kept, strict=True))


def projected(update: FactoredUpdate, directions: Sequence[Tensor], strength: float) -> FactoredUpdate:
    """``Delta_j (I - strength U_j U_j^T)``: the paper's projection after the solution, with each expert's own U_j.

    Raises:
        HyperParamsError: a strength that is not in (0, 1].
    """
    if not 0 < strength <= 1:
        raise HyperParamsError(f"sphere_strength must lie in (0, 1]; found {strength}.")
    right = []
    for expert, v in zip(update.experts, update.right, strict=True):
        u = directions[expert].to(v)
        right.append(v - strength * (u @ (u.T @ v)))
    return replace(update, right=tuple(right))
