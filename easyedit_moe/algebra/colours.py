"""Blocks of a sweep that do not touch each other's rows, taken together: the sweep's result, in fewer and larger steps.

A visit to a block reads and writes the rows of its own tokens only. Blocks of one colour share no row, so their visits
give the same in any order, and at once (pure, torch only).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from easyedit_moe.algebra.systems import solve_factored

LEAST_WIDTH = 3.0
"""Blocks of one colour, on average, from which a sweep by colours is faster than one block after the other."""


def colours(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Places in a sequence of visits, by colour: visiting colour after colour gives what the sequence gives.

    The colour of a visit is one more than the last one of an earlier visit that shares a row with it, so visits that
    share one keep their order.

    Args:
        rows: the rows of each visit.
    """
    last: dict[int, int] = {}
    found: list[list[int]] = []
    for place, own in enumerate(rows):
        colour = 1 + max((last.get(row, -1) for row in own), default=-1)
        last.update(dict.fromkeys(own, colour))
        if colour == len(found):
            found.append([])
        found[colour].append(place)
    return found


def copied_steps(passes: Sequence[Sequence[Sequence[int]]], device: torch.device) -> list[list[Tensor]]:
    """The numbers ``[n]`` int64 of each step of each pass on a device, by one copy, for which the CPU waits once."""
    sizes = [len(step) for steps in passes for step in steps]
    everything = torch.tensor([number for steps in passes for step in steps for number in step], device=device)
    parts = iter(everything.to(torch.int64).split(sizes))
    return [[next(parts) for _ in steps] for steps in passes]


class PaddedBlocks:
    """Blocks with systems of side m or less, side by side: ``B_j = (K_j + lambda I)^{-1} S_j``.

    Attributes:
        rows: ``[n, m]`` int64, filled up with T: the running residual has one row of zeros more than there are tokens.
        operators: ``[n, m, m]``, K_j, filled up with zeros.
        factors: ``[n, m, m]``, lower Cholesky factors of ``K_j + lambda I``, filled up with ones on the diagonal.
        solutions: ``[n, m, r]``, the B_j.
    """

    def __init__(
        self, rows: Sequence[Tensor], operators: Sequence[Tensor], factors: Sequence[Tensor], tokens: int, width: int
    ) -> None:
        side = max(len(own) for own in rows)
        pad = torch.nn.functional.pad
        self.sizes = [len(own) for own in rows]
        spare = [side - size for size in self.sizes]
        self.rows = torch.stack([pad(own, (0, n), value=tokens) for own, n in zip(rows, spare, strict=True)])
        self.operators = torch.stack([pad(one, (0, n, 0, n)) for one, n in zip(operators, spare, strict=True)])
        self.factors = torch.stack([pad(one, (0, n, 0, n)) for one, n in zip(factors, spare, strict=True)])
        free = torch.tensor(self.sizes, device=self.rows.device)[:, None] <= torch.arange(side, device=self.rows.device)
        torch.diagonal(self.factors, dim1=1, dim2=2).add_(free.to(self.factors))
        self.solutions = self.operators.new_zeros(len(rows), side, width)

    def visit(self, places: Tensor, running: Tensor) -> None:
        """Solve for blocks of one colour anew; ``running [T + 1, r]`` is written in place."""
        rows, operators = self.rows[places], self.operators[places]
        local = torch.baddbmm(running[rows], operators, self.solutions[places])
        solutions = solve_factored(self.factors[places], local)
        running[rows] = torch.baddbmm(local, operators, solutions, alpha=-1)
        self.solutions[places] = solutions

    def penalty(self) -> Tensor:
        """``sum_j tr(B_j^T K_j B_j)``."""
        return (self.solutions * (self.operators @ self.solutions)).sum()

    def solution(self, place: int) -> Tensor:
        """``B_j [T_j, r]``."""
        return self.solutions[place, : self.sizes[place]]
