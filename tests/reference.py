"""Slow, obvious references that several test files compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from easyedit_moe.algebra.metric import Metric, covariance_metric
from easyedit_moe.algebra.nullspace import null_space
from easyedit_moe.algebra.routed_keys import RoutedKeys


def loop_psi(keys: RoutedKeys, experts: int) -> Tensor:
    """``psi[t] = concat_j g[t,j] k[t,j]`` as ``[T, E, h]``, one slot at a time."""
    psi = torch.zeros(keys.expert.shape[0], experts, keys.key.shape[2], dtype=torch.float64)
    for t, row in enumerate(keys.expert.tolist()):
        for slot, j in enumerate(row):
            psi[t, j] += keys.gate[t, slot].double() * keys.key[t, slot].double()
    return psi


RIDGE = 0.02
"""Ridge of `random_covariances`."""


def routed(tokens: int, experts: int, width: int, h: int, g: torch.Generator, dtype: torch.dtype) -> RoutedKeys:
    expert = torch.stack([torch.randperm(experts, generator=g)[:width] for _ in range(tokens)])
    gate = torch.rand(tokens, width, generator=g, dtype=torch.float64) + 0.1
    key = torch.randn(tokens, width, h, generator=g, dtype=torch.float64)
    return RoutedKeys(expert, gate.to(dtype), key.to(dtype))


def planted_projectors(experts: int, h: int, g: torch.Generator) -> tuple[Metric, Tensor]:
    """Expert j preserves ``j mod (h + 1)`` directions: from all free (P = I) to none."""
    p, moments = [], []
    for j in range(experts):
        q = torch.linalg.qr(torch.randn(h, h, generator=g, dtype=torch.float64)).Q[:, : j % (h + 1)]
        p.append(torch.eye(h, dtype=torch.float64) - q @ q.T)
        moments.append(q @ torch.diag(1 + torch.rand(q.shape[1], generator=g, dtype=torch.float64)) @ q.T)
    return null_space(torch.stack(moments), torch.full((experts,), 100), 1e-6), torch.stack(p)


def random_covariances(experts: int, h: int, g: torch.Generator) -> tuple[Metric, Tensor]:
    keys = torch.randn(experts, 2 * h, h, generator=g, dtype=torch.float64)
    keys *= torch.logspace(-0.5, 0.5, experts, dtype=torch.float64)[:, None, None]
    moments = keys.mT @ keys / (2 * h)
    counts = torch.arange(1, experts + 1) * 10
    variance = sum(float(n) * float(c.trace()) / h for n, c in zip(counts, moments, strict=True)) / float(counts.sum())
    return covariance_metric(moments, counts, RIDGE), moments + RIDGE * variance * torch.eye(h).double()
