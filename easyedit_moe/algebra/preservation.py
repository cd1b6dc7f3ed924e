"""A bound on what edits do to preserved keys in the long run, kept by a virtual queue (LyapLock; pure).

LyapLock (arXiv 2505.15702) asks that the mean preservation loss over all batches stay below a bound D while each batch
is fitted as well as it can. Lyapunov's drift plus penalty turns that into one problem per batch,

    min  editing loss  +  Z_t * preservation weight,      Z_{t+1} = max(Z_t + (PL_t - D) / D, 1)

whose weight grows while the loss PL_t is above D and shrinks back to what it was while it is below.
"""

from __future__ import annotations

import torch
from torch import Tensor

from easyedit_moe.errors import HyperParamsError, NumericalError

FIRST = 1.0
"""The queue before the first batch, and its least value: the weight is then what the hyper-parameters say."""


def preservation_loss(drift: Tensor, moments: Tensor, counts: Tensor) -> float:
    """``sum_j p_j tr(D_j C_j D_j^T)``: the mean squared change of what experts return for preserved keys.

    With the weights themselves in place of the drift it is the mean energy of what they return.

    Args:
        drift: ``D_j = W_j - W_j^0`` as ``[E, d, h]``.
        moments: ``C_j`` as ``[E, h, h]``.
        counts: ``[E]``, tokens that reached each expert; p_j is an expert's share of them.

    Raises:
        NumericalError: no token at all, or a loss that is not finite.
    """
    tokens = counts.to(torch.float64).tolist()
    every = sum(tokens)
    if not every > 0:
        raise NumericalError("No token reached any expert, so nothing is preserved. Use a larger corpus.")
    shares, losses = [], []
    for one, moment, count in zip(drift, moments, tokens, strict=True):
        if count:
            d = one.to(torch.float64)
            shares.append(count / every)
            losses.append(((d @ moment.to(d)) * d).sum())
    # Read at once: each read of a device waits for it.
    total = 0.0
    for share, loss in zip(shares, torch.stack(losses).tolist(), strict=True):
        total += share * loss
    if not abs(total) < float("inf"):
        raise NumericalError("The preservation loss is NaN or infinite.")
    return max(total, 0.0)


def next_queue(queue: float, loss: float, bound: float) -> float:
    """``max(Z + (loss - bound) / bound, 1)``.

    Raises:
        HyperParamsError: a bound that is not above 0.
    """
    if not bound > 0:
        raise HyperParamsError(f"preservation_bound must be greater than 0; found {bound}.")
    return max(queue + (loss - bound) / bound, FIRST)
