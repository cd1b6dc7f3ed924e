"""The exact minimiser of the objective, by one system (pure, torch only)."""

from __future__ import annotations

import torch
from torch import Tensor

from easyedit_moe.algebra.coordinates import ExpertCoordinates
from easyedit_moe.algebra.held import HeldSystem
from easyedit_moe.algebra.metric import ExpertBlock, Metric, expert_blocks, transposed_root
from easyedit_moe.algebra.routed_keys import FactoredUpdate, RoutedKeys
from easyedit_moe.algebra.systems import (
    CHUNK,
    check_dual_ridges,
    check_lambda,
    factor_ridge_,
    finite_residual,
    resolve_form,
    solve_factored,
)


def solve_exact(
    keys: RoutedKeys, residual: Tensor, lambda_reg: float, metric: Metric, form: str = "auto"
) -> FactoredUpdate:
    """The exact minimiser ("Global", MoTE paper section 3.1) by one system, in float64 by Cholesky.

    Dual (Woodbury / push-through): ``Delta_j = R (sum_j Z_j^T M_j Z_j + lambda I_T)^{-1} Z_j^T M_j``. Primal, where
    there are fewer unknowns than tokens: ``Delta = R^T Phi (Phi^T Phi + lambda I)^{-1} N`` with
    ``Phi [T, sum_j n_j]`` the rows ``concat_j g_tj N_j k_tj``, whose Gram matrix is summed over chunks of tokens.

    Args:
        keys: of T tokens.
        residual: ``[T, d]``, r; rows of zeros keep what those keys now yield.
        lambda_reg: weight of the penalty, >= 0.
        metric: the M_j.
        form: "dual", "primal" or "auto", the smaller.

    Raises:
        NumericalError: singular or non-finite system or residual. HyperParamsError: negative lambda, unknown form.
    """
    check_lambda(lambda_reg)
    wanted, blocks = finite_residual(residual), expert_blocks(keys, metric)
    unknowns = sum(block.unknowns for block in blocks)
    if resolve_form(form, keys.num_tokens, unknowns, lambda_reg) == "primal":
        return _exact_primal(keys, wanted, lambda_reg, metric, blocks)
    gram = wanted.new_zeros(keys.num_tokens, keys.num_tokens)
    for block in blocks:
        gram[block.rows[:, None], block.rows[None, :]] += block.root.T @ block.root
    left = solve_factored(factor_ridge_(gram, lambda_reg), wanted).T.contiguous()
    right = tuple(metric.lift(block.expert, block.root) for block in blocks)
    return FactoredUpdate(left, tuple(b.expert for b in blocks), tuple(b.rows for b in blocks), right)


def solve_exact_held(
    keys: RoutedKeys, residual: Tensor, held: HeldSystem, coordinates: ExpertCoordinates
) -> FactoredUpdate:
    """As `solve_exact` with the held rows before ``keys``, their residuals zero; of the rank of ``keys`` alone.

    Raises:
        NumericalError: as there.
    """
    wanted, reduced = finite_residual(residual), held.reduce(keys)
    left = solve_factored(factor_ridge_(reduced.gram.contiguous(), held.lambda_reg), wanted).T.contiguous()
    if reduced.features is not None:
        right = coordinates.lifted(reduced.features)
    else:
        right = coordinates.dual(reduced.columns or {})
    columns = torch.arange(keys.num_tokens, device=left.device)
    return FactoredUpdate(left, tuple(right), (columns,) * len(right), tuple(right.values()))


def _exact_primal(
    keys: RoutedKeys, wanted: Tensor, lambda_reg: float, metric: Metric, blocks: list[ExpertBlock]
) -> FactoredUpdate:
    sizes = [block.unknowns for block in blocks]
    total, tokens = sum(sizes), keys.num_tokens
    energy = wanted.new_zeros(tokens)
    for block in blocks:
        energy.index_add_(0, block.rows, (block.root**2).sum(0))
    check_dual_ridges([energy], [total], lambda_reg)
    gram, moved = wanted.new_zeros(total, total), wanted.new_zeros(total, wanted.shape[1])
    step = max(1, CHUNK // max(total, 1))
    bounds = _first_places(blocks, tokens, step)
    for number, start in enumerate(range(0, tokens, step)):
        stop, offset = min(start + step, tokens), 0
        phi = wanted.new_zeros(stop - start, total)
        for block, size, places in zip(blocks, sizes, bounds, strict=True):
            low, high = places[number], places[number + 1]
            phi[block.rows[low:high] - start, offset : offset + size] = block.root[:, low:high].T
            offset += size
        gram.addmm_(phi.T, phi)
        moved.addmm_(phi.T, wanted[start:stop])
        del phi  # else it is there while the next one is made
    left = solve_factored(factor_ridge_(gram, lambda_reg), moved).T.contiguous()
    columns = torch.arange(total, device=wanted.device).split(sizes)
    right = tuple(transposed_root(metric, b.expert, b.root, keys.d_hidden) for b in blocks)
    return FactoredUpdate(left, tuple(b.expert for b in blocks), tuple(columns), right)


def _first_places(blocks: list[ExpertBlock], tokens: int, step: int) -> list[list[int]]:
    """Per block, the place of its first row in each chunk of ``step`` tokens, and their number: read all at once."""
    if not blocks:
        return []
    starts = torch.arange(0, tokens + step, step, device=blocks[0].rows.device)
    return torch.stack([torch.searchsorted(block.rows, starts) for block in blocks]).tolist()
