"""Randomised block coordinate descent over experts (pure, torch only)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from easyedit_moe.algebra.colours import LEAST_WIDTH, PaddedBlocks, colours, copied_steps
from easyedit_moe.algebra.metric import ExpertBlock, Metric, expert_blocks, transposed_root
from easyedit_moe.algebra.routed_keys import FactoredUpdate, RoutedKeys
from easyedit_moe.algebra.systems import (
    LARGEST,
    check_dual_ridges,
    check_lambda,
    factor_made_ridges,
    finite_residual,
    moved_together,
    solve_factored,
)
from easyedit_moe.errors import HyperParamsError

SMALL_PASS = 2e9
"""Operations of a BCD pass below which a GPU would mostly wait for launches, so that it runs on the CPU."""


@dataclass(frozen=True)
class BCDReport:
    """Objective before the first pass and after each one; never increasing."""

    objective: tuple[float, ...]


def expert_orders(num_experts: int, num_passes: int, seed: int = 42) -> list[Tensor]:
    """One random order of the experts per pass, from ``torch.randperm`` with a CPU generator."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(num_experts, generator=generator) for _ in range(num_passes)]


class _Coordinate:
    """One expert's block of a BCD solution: T_j x r by push-through, or n_j x r where that is smaller."""

    def __init__(self, rows: Tensor, operator: Tensor, factor: Tensor, primal: bool, width: int) -> None:
        """``operator`` is K_j, or F_j^T where it is ``primal``; ``factor`` that of the block's system."""
        self.rows, self.operator, self.factor, self.primal = rows, operator, factor, primal
        self.solution = operator.new_zeros(operator.shape[1], width)

    def visit(self, running: Tensor) -> None:
        """Give the running residual this block's part back, solve for the block anew, and take the new part away."""
        local = running[self.rows].addmm_(self.operator, self.solution)
        self.solution = solve_factored(self.factor, self.operator.T @ local if self.primal else local)
        running[self.rows] = local.addmm_(self.operator, self.solution, alpha=-1)

    def penalty(self) -> Tensor:
        """``tr(Delta_j M_j^{-1} Delta_j^T)``."""
        return (self.solution * (self.solution if self.primal else self.operator @ self.solution)).sum()


def _is_primal(block: ExpertBlock, lambda_reg: float) -> bool:
    return lambda_reg > 0 and block.root.shape[0] < block.root.shape[1]


def _coordinates(
    blocks: list[ExpertBlock], lambda_reg: float, width: int, device: torch.device
) -> dict[int, _Coordinate]:
    """By expert; all systems are factored together, and all that goes to another device goes at once."""
    primal = [_is_primal(block, lambda_reg) for block in blocks]
    energies = [(b.root**2).sum(0) for b, one in zip(blocks, primal, strict=True) if one]
    unknowns = [b.unknowns for b, one in zip(blocks, primal, strict=True) if one]
    check_dual_ridges(energies, unknowns, lambda_reg)
    parts = [b.root.T if one else b.root.T @ b.root for b, one in zip(blocks, primal, strict=True)]
    operators = moved_together(parts, device)
    rows = moved_together([block.rows for block in blocks], device)
    # Of the primal form an operator is F_j^T, and its system is made when its turn comes.
    factors = factor_made_ridges(
        [k.shape[1] for k in operators],
        lambda place: operators[place].T @ operators[place] if primal[place] else operators[place],
        lambda_reg,
    )
    return {
        block.expert: _Coordinate(own, operator, factor, one, width)
        for block, own, operator, factor, one in zip(blocks, rows, operators, factors, primal, strict=True)
    }


def row_space(wanted: Tensor) -> tuple[Tensor, Tensor | None]:
    """``(C [T, r], Q [d, r])`` with ``wanted = C Q^T`` and orthonormal columns of Q; ``(wanted, None)`` where r would
    not be well below d. Rows of zeros (remembered edits) cost nothing.
    """
    rows = torch.nonzero(wanted.any(1)).squeeze(1)
    if 2 * len(rows) > wanted.shape[1]:
        return wanted.clone(), None
    q, r = torch.linalg.qr(wanted[rows].T)
    compact = wanted.new_zeros(len(wanted), len(rows))
    compact[rows] = r.T
    return compact, q


def solve_bcd(
    keys: RoutedKeys, residual: Tensor, lambda_reg: float, metric: Metric, orders: list[Tensor]
) -> tuple[FactoredUpdate, BCDReport]:
    """Randomised block coordinate descent over experts (MoEEdit, arXiv 2602.10965) with a running residual.

    With ``Delta_j = B_j^T (M_j Z_j)^T`` and ``K_j = Z_j^T M_j Z_j``, a visit to expert j gives the running residual S
    back ``K_j B_j``, solves ``B_j = (K_j + lambda I)^{-1} S`` and takes the new ``K_j B_j`` away: O(T_j^2 r), whatever
    E and h are. An expert whose T_j exceeds n_j is solved on that side: ``Delta_j = D_j^T N_j`` with
    ``D_j = (F_j F_j^T + lambda I)^{-1} F_j S``. Experts that share no token are solved together
    (`easyedit_moe.algebra.colours`), which gives what their order gives. All passes run in the row space of R, of
    dimension r <= min(T, d); on a GPU, small problems are iterated on the CPU.

    Args:
        keys: of T tokens, as in `solve_exact`.
        residual: ``[T, d]``, r.
        lambda_reg: weight of the penalty, >= 0.
        metric: the M_j.
        orders: the order of experts of each pass, see `expert_orders`.

    Raises:
        NumericalError, HyperParamsError: as in `solve_exact`; HyperParamsError for an empty ``orders``.
    """
    if not orders:
        raise HyperParamsError("num_passes must be at least 1.")
    check_lambda(lambda_reg)
    wanted, blocks = finite_residual(residual), expert_blocks(keys, metric)
    running, basis = row_space(wanted)
    work = 4 * running.shape[1] * sum(min(b.root.shape) * b.root.shape[1] for b in blocks)
    device = running.device if work > SMALL_PASS else torch.device("cpu")
    # One row more, which padded blocks read and write.
    running = torch.nn.functional.pad(running, (0, 0, 0, 1)).to(device)
    coordinates = _coordinates(blocks, lambda_reg, running.shape[1], device)
    sweeps = _Sweeps(coordinates, orders, running)

    def objective() -> Tensor:
        return (running**2).sum() + lambda_reg * sweeps.penalty()

    history = [objective()]
    for number in range(len(orders)):
        sweeps.run(number)
        history.append(objective())
    sweeps.finish()
    update = _update(keys, metric, blocks, coordinates, basis, wanted)
    return update, BCDReport(tuple(torch.stack(history).tolist()))


class _Sweeps:
    """Passes over the experts: by colours where enough of them share no token, else one after the other."""

    def __init__(self, coordinates: dict[int, _Coordinate], orders: list[Tensor], running: Tensor) -> None:
        self.running, self.coordinates = running, coordinates
        self.orders = [[expert for expert in order.tolist() if expert in coordinates] for order in orders]
        # All rows are read at once: each read of a device waits for it.
        rows = torch.cat([one.rows for one in coordinates.values()]).tolist() if coordinates else []
        self._rows: dict[int, list[int]] = {}
        for expert, one in coordinates.items():
            self._rows[expert], rows = rows[: len(one.rows)], rows[len(one.rows) :]
        self._places: dict[int, int] = {}
        self._together: list[list[Tensor]] = []
        self._padded: PaddedBlocks | None = None
        small = {e: c for e, c in coordinates.items() if not c.primal and len(c.rows) <= LARGEST}
        self._steps = [
            [[order[place] for place in step] for step in colours([self._rows[expert] for expert in order])]
            for order in self.orders
        ]
        wide = sum(map(len, self.orders)) >= LEAST_WIDTH * sum(map(len, self._steps))
        if small and wide:
            parts = list(small.values())
            self._padded = PaddedBlocks(
                [c.rows for c in parts], [c.operator for c in parts], [c.factor for c in parts], len(running) - 1,
                running.shape[1],
            )  # fmt: skip
            self._places = {expert: place for place, expert in enumerate(small)}
            listed = [[[self._places[e] for e in step if e in small] for step in steps] for steps in self._steps]
            self._together = copied_steps(listed, self.running.device)

    def run(self, number: int) -> None:
        """One pass, in its order."""
        if self._padded is None:
            # One after the other, as each needs what the one before left: nothing is read here, so nothing waits.
            for expert in self.orders[number]:
                self.coordinates[expert].visit(self.running)
            return
        for step, together in zip(self._steps[number], self._together[number], strict=True):
            if len(together):
                self._padded.visit(together, self.running)
            for expert in step:
                if expert not in self._places:
                    self.coordinates[expert].visit(self.running)

    def penalty(self) -> Tensor:
        """``sum_j tr(Delta_j M_j^{-1} Delta_j^T)``."""
        parts = [c.penalty() for expert, c in self.coordinates.items() if expert not in self._places]
        parts += [] if self._padded is None else [self._padded.penalty()]
        return torch.stack(parts).sum() if parts else self.running.new_zeros(())

    def finish(self) -> None:
        """Hand the solutions back to their coordinates."""
        for expert, place in self._places.items():
            if self._padded is not None:
                self.coordinates[expert].solution = self._padded.solution(place)


def _update(
    keys: RoutedKeys,
    metric: Metric,
    blocks: list[ExpertBlock],
    coordinates: dict[int, _Coordinate],
    basis: Tensor | None,
    wanted: Tensor,
) -> FactoredUpdate:
    """Per expert by its own coordinates, or by those of the row space where these are fewer."""
    rank = wanted.shape[1] if basis is None else basis.shape[1]
    few = {block.expert for block in blocks if basis is not None and rank <= len(coordinates[block.expert].solution)}
    own, start = [wanted.new_zeros(0, rank)], rank if few else 0
    columns, right = [], []
    solutions = moved_together([coordinates[block.expert].solution for block in blocks], wanted.device)
    for block, solution in zip(blocks, solutions, strict=True):
        found = coordinates[block.expert]
        if found.primal:
            factor = transposed_root(metric, block.expert, block.root, keys.d_hidden)
        else:
            factor = metric.lift(block.expert, block.root)
        if block.expert in few:
            columns.append(torch.arange(rank, device=wanted.device))
            right.append(factor @ solution)
            continue
        columns.append(torch.arange(start, start + len(solution), device=wanted.device))
        right.append(factor)
        own.append(solution)
        start += len(solution)
    left = torch.cat(own).T.contiguous()
    if basis is not None:
        left = torch.cat([basis, basis @ left] if few else [basis @ left], dim=1)
    return FactoredUpdate(left, tuple(block.expert for block in blocks), tuple(columns), tuple(right))
