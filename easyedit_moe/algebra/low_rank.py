"""A product of two thin matrices as one of the smallest rank, without the product itself."""

from __future__ import annotations

import torch
from torch import Tensor

from easyedit_moe.errors import NumericalError


def low_rank(left: Tensor, right: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Factors of ``left @ right^T``, or of its nearest matrix of a lower rank (Eckart and Young).

    A QR decomposition of each side and the singular values of the ``r x r`` middle are all that is computed, in
    float64; the square root of each singular value goes to either side, so both factors are of the same size.

    Args:
        left: ``[d, r]``, any float dtype.
        right: ``[h, r]``.
        rank: the largest rank of the result; None: that of the product.

    Returns:
        ``b [d, s]`` and ``a [s, h]`` in float64 with ``b @ a ~ left @ right^T``, largest singular value first; ``s`` is
        the product's rank (singular values below float64's resolution are none), or ``rank`` where that is lower.

    Raises:
        NumericalError: a factor is not finite.
    """
    left, right = left.to(torch.float64), right.to(torch.float64)
    if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise NumericalError("The factors hold NaN or infinity, so their product has no rank. Make the edit anew.")
    if left.shape[1] == 0:
        return left, right.T
    left_basis, left_rest = torch.linalg.qr(left)
    right_basis, right_rest = torch.linalg.qr(right)
    turned, values, other = torch.linalg.svd(left_rest @ right_rest.T, full_matrices=False)
    # Relative to the factors and not to the product, which may be nothing but their rounding.
    scale = torch.linalg.matrix_norm(left_rest) * torch.linalg.matrix_norm(right_rest)
    smallest = scale * torch.finfo(torch.float64).eps * max(len(left), len(right))
    found = int((values > smallest).sum())
    kept = found if rank is None else min(rank, found)
    root = values[:kept].sqrt()
    return left_basis @ (turned[:, :kept] * root), (root[:, None] * other[:kept]) @ right_basis.T


def rounded_difference(b: Tensor, a: Tensor, b_rounded: Tensor, a_rounded: Tensor) -> float:
    """``||b @ a - b' @ a'||`` (Frobenius) for factors of `low_rank` and what was made of their leading ranks.

    The difference is a sum of what was cut off, ``(b - b') @ a`` and ``b' @ (a - a')``, each as small as it is, so that
    Gram matrices of these factors do not cancel and nothing is decomposed.

    Args:
        b: ``[d, s]`` float64, as `low_rank` returns it.
        a: ``[s, h]``, likewise.
        b_rounded: b', the leading ``t <= s`` columns of b in any float dtype.
        a_rounded: a', the leading t rows of a.
    """
    kept = len(a_rounded)
    b_rounded, a_rounded = b_rounded.to(b), a_rounded.to(a)
    left = torch.cat([b[:, kept:], b[:, :kept] - b_rounded, b_rounded], dim=1)
    right = torch.cat([a[kept:], a[:kept], a[:kept] - a_rounded])
    return float(((left.T @ left) * (right @ right.T)).sum().clamp_min(0).sqrt())
