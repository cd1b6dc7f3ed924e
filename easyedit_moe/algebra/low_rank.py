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


def product_norm(left: Tensor, right: Tensor) -> float:
    """``||left @ right^T||`` (Frobenius) of ``left [d, r]`` and ``right [h, r]``, without the product.

    Computed from both QR decompositions rather than from Gram matrices: a difference that cancels almost keeps its
    digits.
    """
    if left.shape[1] == 0:
        return 0.0
    rests = [torch.linalg.qr(factor.to(torch.float64), mode="r").R for factor in (left, right)]
    return float(torch.linalg.matrix_norm(rests[0] @ rests[1].T))
