"""BCD over experts where earlier edits are held by their second moment (pure, torch only)."""

from __future__ import annotations

import torch
from torch import Tensor

from easyedit_moe.algebra.bcd import BCDReport
from easyedit_moe.algebra.coordinates import ExpertCoordinates
from easyedit_moe.algebra.held import HeldMoment
from easyedit_moe.algebra.routed_keys import FactoredUpdate, RoutedKeys
from easyedit_moe.algebra.systems import check_lambda, factor_ridge_, finite_residual, solve_factored
from easyedit_moe.errors import HyperParamsError


class _Block:
    """One expert's unknowns ``D_j [n_j, r]``, with ``Delta_j = D_j^T N_j``."""

    def __init__(self, rows: Tensor, root: Tensor, unknowns: slice, moment: Tensor, lambda_reg: float) -> None:
        self.rows, self.root, self.unknowns = rows, root, unknowns
        self.own = moment[unknowns, unknowns]
        self.factor = factor_ridge_(root @ root.T + self.own, lambda_reg)

    def visit(self, running: Tensor, pull: Tensor, solution: Tensor, moment: Tensor) -> None:
        """Solve for the block anew; ``running`` is the new rows' residual, ``pull`` the moment times the solution."""
        before = solution[self.unknowns]
        local = running[self.rows].addmm_(self.root.T, before)
        wanted = self.root @ local - pull[self.unknowns] + self.own @ before
        after = solve_factored(self.factor, wanted)
        running[self.rows] = local.addmm_(self.root.T, after, alpha=-1)
        pull.addmm_(moment[:, self.unknowns], after - before)
        solution[self.unknowns] = after


def solve_bcd_held(
    keys: RoutedKeys,
    residual: Tensor,
    lambda_reg: float,
    held: HeldMoment,
    coordinates: ExpertCoordinates,
    orders: list[Tensor],
) -> tuple[FactoredUpdate, BCDReport]:
    """As `easyedit_moe.algebra.bcd.solve_bcd` with the held rows before ``keys``, their residuals zero.

    The same iterates, at a cost that does not depend on the number of held rows; of the rank of the residuals.

    Raises:
        NumericalError, HyperParamsError: as there; HyperParamsError where lambda is 0.
    """
    if not orders or not lambda_reg > 0:
        raise HyperParamsError("num_passes must be at least 1, and lambda_reg above 0 where edits are held.")
    check_lambda(lambda_reg)
    wanted = finite_residual(residual)
    basis, rest = torch.linalg.qr(wanted.T)
    running = rest.T.contiguous()
    encoded = coordinates.encode(keys)
    moment = held.moment
    if moment is None:
        moment = running.new_zeros(coordinates.size, coordinates.size)
    solution = running.new_zeros(coordinates.size, running.shape[1])
    pull = torch.zeros_like(solution)
    blocks = _blocks(encoded, coordinates, moment, lambda_reg)

    def objective() -> Tensor:
        return (running**2).sum() + (solution * pull).sum() + lambda_reg * (solution**2).sum()

    history = [objective()]
    for order in orders:
        for expert in order.tolist():
            if expert in blocks:
                blocks[expert].visit(running, pull, solution, moment)
        history.append(objective())
    right = coordinates.lifted(solution)
    columns = (torch.arange(basis.shape[1], device=basis.device),) * len(right)
    update = FactoredUpdate(basis, tuple(right), columns, tuple(right.values()))
    return update, BCDReport(tuple(torch.stack(history).tolist()))


def _blocks(rows: RoutedKeys, coordinates: ExpertCoordinates, moment: Tensor, lambda_reg: float) -> dict[int, _Block]:
    """Of every expert: held rows couple those that new rows do not hit, too."""
    found, none = {}, torch.zeros(0, dtype=torch.int64, device=moment.device)
    parts = {part.expert: part for part in rows.design(moment.dtype)}
    for expert, (start, size) in enumerate(zip(coordinates.starts, coordinates.sizes, strict=True)):
        part, unknowns = parts.get(expert), slice(start, start + size)
        rooted = moment.new_zeros(size, 0) if part is None else coordinates.metric.root(expert, part.z)
        found[expert] = _Block(none if part is None else part.rows, rooted, unknowns, moment, lambda_reg)
    return found
