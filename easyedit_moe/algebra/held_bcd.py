"""BCD over experts where earlier edits are held by their second moment (pure, torch only)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from easyedit_moe.algebra.bcd import BCDReport
from easyedit_moe.algebra.colours import LEAST_WIDTH, colours, copied_steps
from easyedit_moe.algebra.coordinates import ExpertCoordinates
from easyedit_moe.algebra.held import HeldMoment
from easyedit_moe.algebra.routed_keys import FactoredUpdate, RoutedKeys
from easyedit_moe.algebra.systems import (
    CHUNK,
    check_factored,
    check_lambda,
    factor_stack_,
    finite_residual,
    solve_factored,
)
from easyedit_moe.errors import HyperParamsError


def solve_bcd_held(
    keys: RoutedKeys,
    residual: Tensor,
    lambda_reg: float,
    held: HeldMoment,
    coordinates: ExpertCoordinates,
    orders: list[Tensor],
) -> tuple[FactoredUpdate, BCDReport]:
    """As `easyedit_moe.algebra.bcd.solve_bcd` with the held rows before ``keys``, their residuals zero.

    The same iterates, at a cost that does not depend on the number of held rows; of the rank of the residuals. Experts
    that share no token, new or held, are solved together. What the CPU waits for does not grow with the experts.

    Raises:
        NumericalError, HyperParamsError: as there; HyperParamsError where lambda is 0.
    """
    if not orders or not lambda_reg > 0:
        raise HyperParamsError("num_passes must be at least 1, and lambda_reg above 0 where edits are held.")
    check_lambda(lambda_reg)
    basis, rest = torch.linalg.qr(finite_residual(residual).T)
    moment = held.moment
    if moment is None:
        moment = rest.new_zeros(coordinates.size, coordinates.size)
    blocks = _Blocks(coordinates.encode(keys), coordinates, moment, lambda_reg)
    state = _State(rest.T, moment)
    sweeps = _Sweeps(blocks, orders, state)
    history = [state.objective(lambda_reg)]
    for number in range(len(orders)):
        sweeps.run(number)
        history.append(state.objective(lambda_reg))
    right = coordinates.lifted(state.solution[:-1])
    columns = (torch.arange(basis.shape[1], device=basis.device),) * len(right)
    update = FactoredUpdate(basis, tuple(right), columns, tuple(right.values()))
    return update, BCDReport(tuple(torch.stack(history).tolist()))


class _State:
    """What visits read and write. Each table has one row of zeros more, which padded blocks read and write.

    Attributes:
        running: ``[T + 1, r]``, the new rows' residual.
        solution: ``[N + 1, r]``, the D_j below one another, with ``Delta_j = D_j^T N_j``.
        pull: ``[N + 1, r]``, the moment times the solution.
        moment: ``[N, N]``, of the held rows.
    """

    def __init__(self, residual: Tensor, moment: Tensor) -> None:
        self.running = torch.nn.functional.pad(residual, (0, 0, 0, 1))
        self.solution = self.running.new_zeros(len(moment) + 1, residual.shape[1])
        self.pull, self.moment = torch.zeros_like(self.solution), moment

    def objective(self, lambda_reg: float) -> Tensor:
        """Of the new rows and the held ones."""
        held = (self.solution * self.pull).sum()
        return (self.running**2).sum() + held + lambda_reg * (self.solution**2).sum()


class _Blocks:
    """Every expert's unknowns ``D_j [n_j, r]``: held rows couple those that new rows do not hit, too.

    Attributes:
        experts: those that have unknowns; all else is in their order.
        sizes, tokens: n_j and T_j of each.
        rows: ``[n, m]`` int64, the tokens of each, filled up with T.
        unknowns: ``[n, w]`` int64, filled up with N.
        roots: ``[n, w, m]``, ``N_j Z_j``, filled up with zeros.
        own: ``[n, w, w]``, the moment's diagonal blocks, likewise.
        factors: ``[n, w, w]``, of ``F_j F_j^T + own + lambda I``, filled up with ones on the diagonal.
    """

    def __init__(self, rows: RoutedKeys, coordinates: ExpertCoordinates, moment: Tensor, lambda_reg: float) -> None:
        pad, device = torch.nn.functional.pad, moment.device
        parts = {part.expert: part for part in rows.design(moment.dtype)}
        self.experts = [expert for expert, size in enumerate(coordinates.sizes) if size]
        self.sizes = [coordinates.sizes[expert] for expert in self.experts]
        self.starts = [coordinates.starts[expert] for expert in self.experts]
        self.tokens = [len(parts[e].rows) if e in parts else 0 for e in self.experts]
        wide, most = max(self.sizes, default=0), max(self.tokens, default=0)
        places, roots, own = [], [], []
        for expert, start, size, count in zip(self.experts, self.starts, self.sizes, self.tokens, strict=True):
            part = parts.get(expert)
            root = moment.new_zeros(size, 0) if part is None else coordinates.metric.root(expert, part.z)
            where = torch.zeros(0, dtype=torch.int64, device=device) if part is None else part.rows
            places.append(pad(where, (0, most - count), value=rows.num_tokens))
            roots.append(pad(root, (0, most - count, 0, wide - size)))
            diagonal = moment[start : start + size, start : start + size]
            own.append(pad(diagonal, (0, wide - size, 0, wide - size)))
        free = torch.arange(wide, device=device) >= torch.tensor(self.sizes, device=device)[:, None]
        number = torch.arange(wide, device=device) + torch.tensor(self.starts, device=device)[:, None]
        self.unknowns = torch.where(free, len(moment), number)
        self.rows = torch.stack(places) if places else torch.zeros(0, most, dtype=torch.int64, device=device)
        self.roots = torch.stack(roots) if roots else moment.new_zeros(0, wide, most)
        self.own = torch.stack(own) if own else moment.new_zeros(0, wide, wide)
        self.factors = self._factored(free, lambda_reg)

    def _factored(self, free: Tensor, lambda_reg: float) -> Tensor:
        found, step = torch.empty_like(self.own), max(1, CHUNK // max(1, self.own[:1].numel()))
        added, parts = found.new_full(free.shape, lambda_reg).masked_fill_(free, 1.0), []
        for start in range(0, len(self.experts), step):
            some = slice(start, start + step)
            systems = torch.baddbmm(self.own[some], self.roots[some], self.roots[some].mT, out=found[some])
            torch.diagonal(systems, dim1=1, dim2=2).add_(added[some])
            parts.append(factor_stack_(systems))
        check_factored(parts, self.sizes, lambda_reg)
        return found.mT  # in which they lie, see `factor_stack_`

    def visit(self, place: int, state: _State) -> None:
        """Solve for one block anew."""
        size, start = self.sizes[place], self.starts[place]
        rows, unknowns = self.rows[place, : self.tokens[place]], slice(start, start + size)
        root = self.roots[place, :size, : len(rows)]
        before = state.solution[unknowns].clone()
        local = state.running[rows].addmm_(root.T, before)
        wanted = root @ local - state.pull[unknowns] + self.own[place, :size, :size] @ before
        after = solve_factored(self.factors[place, :size, :size], wanted)
        state.running[rows] = local.addmm_(root.T, after, alpha=-1)
        state.pull[:-1].addmm_(state.moment[:, unknowns], after - before)
        state.solution[unknowns] = after

    def visit_together(self, places: Tensor, state: _State) -> None:
        """Solve for blocks of one colour anew."""
        rows, unknowns, roots = self.rows[places], self.unknowns[places], self.roots[places]
        before = state.solution[unknowns]
        local = torch.baddbmm(state.running[rows], roots.mT, before)
        wanted = torch.baddbmm(roots @ local - state.pull[unknowns], self.own[places], before)
        after = solve_factored(self.factors[places], wanted)
        state.running[rows] = torch.baddbmm(local, roots.mT, after, alpha=-1)
        # What fills up a block did not change, so that any column of the moment will do.
        columns = unknowns.flatten().clamp_max(len(state.moment) - 1)
        state.pull[:-1].addmm_(state.moment[:, columns], (after - before).flatten(0, 1))
        state.solution[unknowns] = after

    def shared(self, moment: Tensor, count: int) -> list[list[int]]:
        """Of each block numbers that it has in common with every block that its visit bears on: its tokens below
        ``count``, and one for each pair of blocks that held rows tie together.
        """
        owner = torch.tensor([p for p, size in enumerate(self.sizes) for _ in range(size)], device=moment.device)
        tied = moment.new_zeros(len(self.experts), len(self.experts))
        for place, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
            touched = (moment[start : start + size] != 0).any(0)
            tied[place].index_add_(0, owner, touched.to(tied))
        pairs = (tied + tied.T > 0).tolist()
        found = [own[:number] for own, number in zip(self.rows.tolist(), self.tokens, strict=True)]
        for i, ties in enumerate(pairs):
            for j in range(i):
                if ties[j]:
                    found[i].append(count + i * len(pairs) + j)
                    found[j].append(count + i * len(pairs) + j)
        return found


class _Sweeps:
    """Passes over the experts: by colours where enough of them share no row, else one after the other."""

    def __init__(self, blocks: _Blocks, orders: Sequence[Tensor], state: _State) -> None:
        self.blocks, self.state = blocks, state
        place = {expert: number for number, expert in enumerate(blocks.experts)}
        self.orders = [[place[expert] for expert in order.tolist() if expert in place] for order in orders]
        self.steps: list[list[list[int]]] = []
        if place:
            shared = blocks.shared(state.moment, len(state.running))
            self.steps = [
                [[order[number] for number in step] for step in colours([shared[number] for number in order])]
                for order in self.orders
            ]
        self.wide = sum(map(len, self.orders)) >= LEAST_WIDTH * max(1, sum(map(len, self.steps)))
        self.together = copied_steps(self.steps, state.moment.device) if self.wide else []

    def run(self, number: int) -> None:
        """One pass, in its order."""
        if not self.wide:
            # One after the other, as each needs what the one before left: nothing is read here, so nothing waits.
            for place in self.orders[number]:
                self.blocks.visit(place, self.state)
            return
        for together in self.together[number]:
            self.blocks.visit_together(together, self.state)
