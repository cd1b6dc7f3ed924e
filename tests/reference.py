"""Slow, obvious references that several test files compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from easyedit_moe.algebra.routed_keys import RoutedKeys


def loop_psi(keys: RoutedKeys, experts: int) -> Tensor:
    """``psi[t] = concat_j g[t,j] k[t,j]`` as ``[T, E, h]``, one slot at a time."""
    psi = torch.zeros(keys.expert.shape[0], experts, keys.key.shape[2], dtype=torch.float64)
    for t, row in enumerate(keys.expert.tolist()):
        for slot, j in enumerate(row):
            psi[t, j] += keys.gate[t, slot].double() * keys.key[t, slot].double()
    return psi
