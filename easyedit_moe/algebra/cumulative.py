"""A ridge on the sum of all edits instead of each batch's own part (as LyapLock, arXiv 2505.15702, has it; pure).

With D what earlier batches changed, the objective

    sum_t || r_t - sum_j g_tj Delta_j k_tj ||^2  +  lambda sum_j tr((D_j + Delta_j) M_j^{-1} (D_j + Delta_j)^T)

is that of ``Delta' = D + Delta`` alone with residuals ``r_t + sum_j g_tj D_j k_tj``. So any solver finds it, and the
step is ``Delta' - D``. Where rows of earlier facts keep the residuals that they were first solved for, what a run of
batches leads to is the solution for all current facts at once, however many edits there were.
"""

from __future__ import annotations

import torch
from torch import Tensor

from easyedit_moe.algebra.routed_keys import FactoredUpdate, RoutedKeys


def output_change(drift: Tensor, keys: RoutedKeys) -> Tensor:
    """``sum_j g_tj D_j k_tj`` as ``[T, d]`` float64, for ``drift [E, d, h]``."""
    out = torch.zeros(keys.num_tokens, drift.shape[1], dtype=torch.float64, device=drift.device)
    for part in keys.design(torch.float64):
        out.index_add_(0, part.rows, (drift[part.expert].to(torch.float64) @ part.z).T)
    return out


def less(update: FactoredUpdate, drift: Tensor) -> FactoredUpdate:
    """``Delta' - D`` with the unit matrix as the left factor, so that its rank is at most d.

    Args:
        update: Delta', of some experts.
        drift: D as ``[E, d, h]``; experts in which it is 0 and that the update leaves alone are left alone.
    """
    steps = {expert: -drift[expert].to(update.left) for expert in _changed(drift)}
    for expert, delta in update.deltas():
        steps[expert] = steps[expert] + delta if expert in steps else delta
    width = drift.shape[1]
    unit = torch.eye(width, dtype=update.left.dtype, device=update.left.device)
    columns = torch.arange(width, device=update.left.device)
    experts = tuple(sorted(steps))
    return FactoredUpdate(unit, experts, (columns,) * len(experts), tuple(steps[e].T.contiguous() for e in experts))


def _changed(drift: Tensor) -> list[int]:
    return torch.nonzero(drift.flatten(1).any(1)).flatten().tolist()
