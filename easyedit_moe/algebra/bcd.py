"""Randomised block coordinate descent over experts (pure, torch only)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from easyedit_moe.algebra.colours import LARGEST, LEAST_WIDTH, PaddedBlocks, colours
from easyedit_moe.algebra.metric import ExpertBlock, Metric, expert_blocks, transposed_root
from easyedit_moe.algebra.routed_keys import FactoredUpdate, RoutedKeys
from easyedit_moe.algebra.systems import (
    check_dual_ridge,
    check_lambda,
    factor_ridge_,
    factor_ridges,
    finite_residual,
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

    def __init__(
        self,
        block: ExpertBlock,
        lambda_reg: float,
        width: int,
        device: torch.device,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """``known`` are K_j and the factor of ``K_j + lambda I``, where others' were made along with them."""
        root = block.root
        self.primal = _is_primal(block, lambda_reg)
        if known is not None:
            self.operator, self.factor = known
        else:
            if self.primal:
                check_dual_ridge((root**2).sum(0), root.shape[0], lambda_reg)
            self.operator = (root.T if self.primal else root.T @ root).to(device)
            system = root @ root.T if self.primal else self.operator
            self.factor = factor_ridge_(system.to(device, copy=True).contiguous(), lambda_reg)
        self.rows = block.rows.to(device)
        self.solution = torch.zeros(self.operator.shape[1], width, dtype=root.dtype, device=device)

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
    """By expert; small systems are factored together."""
    small = [b for b in blocks if len(b.rows) <= LARGEST and not _is_primal(b, lambda_reg)]
    operators = [(b.root.T @ b.root).to(device) for b in small]
    factors = factor_ridges(operators, lambda_reg)
    known = {b.expert: (k, f) for b, k, f in zip(small, operators, factors, strict=True)}
    return {b.expert: _Coordinate(b, lambda_reg, width, device, known.get(b.expert)) for b in blocks}


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

    def objective() -> float:
        return float((running**2).sum() + lambda_reg * sweeps.penalty())

    history = [objective()]
    for number in range(len(orders)):
        sweeps.run(number)
        history.append(objective())
    sweeps.finish()
    update = _update(keys, metric, blocks, coordinates, basis, wanted)
    return update, BCDReport(tuple(history))


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
        self._padded: PaddedBlocks | None = None
        small = {e: c for e, c in coordinates.items() if not c.primal and len(c.rows) <= LARGEST}
        self._steps = [colours([self._rows[expert] for expert in order]) for order in self.orders]
        wide = sum(map(len, self.orders)) >= LEAST_WIDTH * sum(map(len, self._steps))
        if small and wide:
            parts = list(small.values())
            self._padded = PaddedBlocks(
                [c.rows for c in parts], [c.operator for c in parts], [c.factor for c in parts], len(running) - 1,
                running.shape[1],
            )  # fmt: skip
            self._places = {expert: place for place, expert in enumerate(small)}

    def run(self, number: int) -> None:
        """One pass, in its order."""
        order = self.orders[number]
        if self._padded is None:
            for expert in order:
                self.coordinates[expert].visit(self.running)
            return
        steps = [[order[place] for place in step] for step in self._steps[number]]
        # One copy to the device for the whole pass.
        listed = [[self._places[expert] for expert in step if expert in self._places] for step in steps]
        places = torch.tensor([place for some in listed for place in some], device=self.running.device)
        for step, together in zip(steps, places.split([len(some) for some in listed]), strict=True):
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
    for block in blocks:
        found = coordinates[block.expert]
        solution = found.solution.to(wanted.device)
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
