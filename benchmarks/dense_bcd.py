"""Block coordinate descent by factored blocks, by dense updates with a running residual, and as published code does it.

Three ways to the same update, in one run. "running residual, dense updates": a plain implementation of the algorithm
whose residual is updated in place at each visit, so that a pass costs O(E): the baseline to compare with. "all experts
anew at each visit": MoEEdit's public code as we read it computes the outputs of all other experts whenever it visits
one, which is O(E^2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import interleaved
from benchmarks.shapes import MODELS, QUICK, random_keys, random_residual
from benchmarks.solvers import LAMBDA, PASSES, naive_bcd, relative_difference
from easyedit_moe.algebra.bcd import expert_orders, solve_bcd
from easyedit_moe.algebra.metric import IdentityMetric
from easyedit_moe.algebra.routed_keys import FactoredUpdate, RoutedKeys

OURS, WRITTEN = "factored blocks", "factored blocks, dense update written out"
RUNNING, ANEW = "running residual, dense updates", "all experts anew at each visit"


@dataclass(frozen=True)
class Options:
    """Of one layer's system; ``anew`` runs the O(E^2) one, too, which takes minutes, once."""

    model: str = "qwen3-30b-a3b"
    tokens: int = 50
    repeats: int = 5
    anew: bool = True
    device: str = "cpu"
    quick: bool = False


def running_bcd(keys: RoutedKeys, residual: Tensor, lambda_reg: float, delta: Tensor, orders: list[Tensor]) -> None:
    """Block coordinate descent into ``delta [E, d, h]`` float32, zeros at first, with the residual kept up to date.

    At a visit the running residual S of the expert's tokens gets ``Delta_j Z_j`` back, and
    ``Delta_j = S (Z_j^T Z_j + lambda I)^{-1} Z_j^T`` takes its new part away.
    """
    left = residual.T.contiguous()
    blocks = {block.expert: block for block in keys.design(torch.float32)}
    for order in orders:
        for j in order.tolist():
            if j not in blocks:
                continue
            rows, z = blocks[j].rows, blocks[j].z
            wanted = left[:, rows] + delta[j] @ z
            gram = z.T @ z
            gram.diagonal().add_(lambda_reg)
            torch.mm(torch.linalg.solve(gram, wanted.T).T, z.T, out=delta[j])
            left[:, rows] = wanted - delta[j] @ z


def run(options: Options) -> list[dict[str, Any]]:
    """A row per way, each with the distance of its update from that of the factored blocks."""
    shape = QUICK if options.quick else MODELS[options.model]
    tokens = 6 if options.quick else options.tokens
    keys, residual = random_keys(shape, tokens, options.device), random_residual(shape, tokens, options.device)
    orders, metric = expert_orders(shape.experts, PASSES), IdentityMetric()
    # Made beforehand for both that write dense updates.
    dense = torch.zeros(shape.experts, shape.d_model, shape.d_hidden, device=options.device)
    updates: dict[str, Any] = {}

    def ours() -> FactoredUpdate:
        return solve_bcd(keys, residual, LAMBDA, metric, orders)[0]

    def written() -> None:
        for expert, delta in ours().to(dtype=torch.float32).deltas():
            dense[expert] = delta

    def running() -> None:
        dense.zero_()
        running_bcd(keys, residual, LAMBDA, dense, orders)

    def anew() -> None:
        updates[ANEW] = naive_bcd(keys, residual, LAMBDA, shape.experts, orders)

    ways: dict[str, Callable[[], Any]] = {OURS: ours, WRITTEN: written, RUNNING: running}
    times = interleaved(ways, 2 if options.quick else options.repeats)
    if options.anew:
        times |= interleaved({ANEW: anew}, 1, once=[ANEW])
    update = ours()
    for name in (WRITTEN, RUNNING):
        ways[name]()
        updates[name] = relative_difference(dense, update)
    if ANEW in updates:
        updates[ANEW] = relative_difference(updates[ANEW], update)
    return [
        {
            "benchmark": "dense BCD", "model": shape.name, "device": options.device, "tokens": tokens, "passes": PASSES,
            "way": name, **timing, "against ours": timing["seconds"] / times[OURS]["seconds"],
            "against ours written out": timing["seconds"] / times[WRITTEN]["seconds"],
            "difference to ours": updates.get(name),
        }
        for name, timing in times.items()
    ]  # fmt: skip
