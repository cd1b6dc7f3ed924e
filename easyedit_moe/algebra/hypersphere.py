"""Updates kept out of the principal directions of an expert's weights (SPHERE, arXiv 2510.01172; pure)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from easyedit_moe.algebra.nullspace import leading_directions
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
    if not 0 < energy <= 1:
        raise HyperParamsError(f"sphere_energy must lie in (0, 1]; found {energy}.")
    w = weight.to(torch.float64)
    if not torch.isfinite(w).all():
        raise NumericalError("An expert's weights hold NaN or infinity, so they have no principal directions.")
    values, vectors = torch.linalg.eigh(w.T @ w / w.shape[0])
    return vectors[:, len(values) - leading_directions(values.flip(0), energy) :]


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
