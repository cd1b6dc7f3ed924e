"""Norm-anchored scaling: an expert's update is shortened so that its matrix stays near its first norm (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from easyedit_moe.algebra.routed_keys import FactoredUpdate
from easyedit_moe.errors import HyperParamsError, NumericalError


def anchored(
    update: FactoredUpdate, weights: Mapping[int, Tensor], norms: Tensor, factor: float
) -> tuple[FactoredUpdate, Tensor]:
    """The update with ``s_j Delta_j`` in place of ``Delta_j``, s_j the largest in [0, 1] with

        ||W_j + s_j Delta_j||_F <= max(factor * ||W_j^0||_F, ||W_j||_F)

    (Frobenius), by the root of a quadratic. It is arXiv 2602.02543's idea, norms anchored in the unedited model, with
    each expert's own matrix as the anchor; the paper rescales value vectors instead.

    Args:
        update: of one layer, any float dtype.
        weights: ``W_j [d, h]`` before the update, of each expert that it changes.
        norms: ``[E]``, ``||W_j^0||_F`` of the unedited matrices.
        factor: >= 1.

    Returns:
        The scaled update, and ``[len(experts)]`` float64 the s_j.

    Raises:
        HyperParamsError: a factor below 1. NumericalError: a norm or product that is not finite.
    """
    if not factor >= 1:
        raise HyperParamsError(f"norm_anchor must be at least 1; found {factor}.")
    parts = []
    for expert, columns, old in zip(update.experts, update.columns, update.right, strict=True):
        left, v = update.left[:, columns].to(torch.float64), old.to(torch.float64)
        w = weights[expert].to(left)
        square = ((left.T @ left) * (v.T @ v)).sum().clamp_min(0)
        parts.append(torch.stack([square, ((w @ v) * left).sum(), (w * w).sum()]))
    # Read at once: each read of a device waits for it.
    numbers, first = torch.stack(parts).tolist() if parts else [], norms.tolist()
    scales = []
    for expert, (square, inner, size) in zip(update.experts, numbers, strict=True):
        bound = max((factor * first[expert]) ** 2, size)
        scales.append(_largest_step(square, inner, size - bound))
    right = [old * scale if scale < 1 else old for old, scale in zip(update.right, scales, strict=True)]
    return replace(update, right=tuple(right)), torch.tensor(scales, dtype=torch.float64)


def _largest_step(square: float, inner: float, slack: float) -> float:
    """The largest s in [0, 1] with ``square s^2 + 2 inner s + slack <= 0``; slack is at most 0."""
    if not all(abs(number) < float("inf") for number in (square, inner, slack)):
        raise NumericalError("An update or weight holds NaN or infinity, so its norm can't be anchored.")
    if square + 2 * inner + slack <= 0:
        return 1.0
    root = float(max(inner * inner - square * slack, 0.0) ** 0.5)
    # Of the two equal forms the one that does not cancel.
    step = -slack / (inner + root) if inner > 0 else (root - inner) / square
    return min(max(step, 0.0), 1.0)
