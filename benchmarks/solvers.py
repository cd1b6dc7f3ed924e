"""Solvers, write-back and Tucker bases at the true shapes of the papers' models; random keys, true sparsity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import interleaved, peak_of
from benchmarks.shapes import MODELS, QUICK, ModelShape, one_layer_model, random_keys, random_residual
from easyedit_moe.algebra.bcd import expert_orders, solve_bcd
from easyedit_moe.algebra.core import solve_mote
from easyedit_moe.algebra.core_update import expand_core
from easyedit_moe.algebra.exact import solve_exact
from easyedit_moe.algebra.metric import IdentityMetric, objective
from easyedit_moe.algebra.routed_keys import FactoredUpdate, RoutedKeys
from easyedit_moe.algebra.tucker import TuckerBasis, tucker_basis
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches.weights import PatchWriter

LAMBDA = 1.0
PASSES = 4


@dataclass(frozen=True)
class Options:
    """``models`` and ``tokens`` are separated by commas; the naive BCD takes half a minute per pass on a small CPU, so
    it runs for ``naive_model`` at ``naive_tokens`` only.
    """

    models: str = "qwen3-30b-a3b,gpt-oss-20b,qwen3.6-35b-a3b"
    tokens: str = "1,50,1000"
    naive_model: str = "qwen3-30b-a3b"
    naive_tokens: int = 50
    repeats: int = 5
    device: str = "cpu"
    quick: bool = False


def run(options: Options) -> list[dict[str, Any]]:
    """Rows of the tables "tucker basis", "solvers" and "write-back"."""
    shapes = [QUICK] if options.quick else [MODELS[name] for name in options.models.split(",")]
    tokens = (1, 6) if options.quick else tuple(int(n) for n in options.tokens.split(","))
    rows: list[dict[str, Any]] = []
    for number, shape in enumerate(shapes):
        naive = (shape.name == options.naive_model and options.naive_tokens) or (options.quick and tokens[-1])
        view = MoELayerView(one_layer_model(shape, options.device))
        found, basis = _bases(shape, view, options, low_ranks=number == 0)
        rows += found
        for count in tokens:
            rows += _solvers(shape, count, basis, options, naive=count == naive)
        rows += _write_back(shape, view, options)
        if number == 0:
            view = MoELayerView(one_layer_model(shape, options.device, torch.float32))
            rows += _write_back(shape, view, options)
    return rows


def naive_bcd(keys: RoutedKeys, residual: Tensor, lambda_reg: float, num_experts: int, orders: list[Tensor]) -> Tensor:
    """``Delta [E, d, h]`` float32 by block coordinate descent as MoEEdit's paper (arXiv 2602.10965) states it.

    At each visit the outputs of all other experts are computed anew from dense updates to find the residual that is
    left for expert j, and ``Delta_j = R_j Z_j^T (Z_j Z_j^T + lambda I)^{-1}`` is solved as an h x h system.
    """
    z = keys.dense(num_experts, torch.float32).view(keys.num_tokens, num_experts, -1).permute(1, 2, 0).contiguous()
    delta = torch.zeros(num_experts, residual.shape[1], z.shape[1], device=residual.device)
    eye = lambda_reg * torch.eye(z.shape[1], device=z.device)
    for order in orders:
        for j in order.tolist():
            left = residual.T.clone()
            for other in range(num_experts):
                if other != j:
                    left -= delta[other] @ z[other]
            delta[j] = torch.linalg.solve(z[j] @ z[j].T + eye, z[j] @ left.T).T
    return delta


def _solvers(shape: ModelShape, tokens: int, basis: TuckerBasis, options: Options, naive: bool) -> list[dict[str, Any]]:
    keys, residual = random_keys(shape, tokens, options.device), random_residual(shape, tokens, options.device)
    metric, orders = IdentityMetric(), expert_orders(shape.experts, PASSES)
    dense = torch.empty(0)
    found: dict[str, Any] = {}

    def keep(name: str, solve: Callable[[], Any]) -> Callable[[], None]:
        def call() -> None:
            found[name] = solve()

        return call

    def bcd() -> FactoredUpdate:
        return solve_bcd(keys, residual, LAMBDA, metric, orders)[0]

    def bcd_dense() -> Tensor:
        nonlocal dense
        if dense.numel() == 0:  # memory that the warm-up made, as the naive one's is made before its passes
            dense = torch.zeros(shape.experts, shape.d_model, shape.d_hidden, device=options.device)
        for expert, delta in bcd().to(dtype=torch.float32).deltas():
            dense[expert] = delta
        return dense

    def mote() -> FactoredUpdate:
        return expand_core(solve_mote(keys, residual, LAMBDA, metric, basis), basis, metric)

    contenders = {
        f"BCD, {PASSES} passes": keep(f"BCD, {PASSES} passes", bcd),
        "exact": keep("exact", lambda: solve_exact(keys, residual, LAMBDA, metric)),
        "MoTE": keep("MoTE", mote),
    }
    once = []
    if naive:
        contenders[f"BCD, {PASSES} passes, dense update"] = keep("dense", bcd_dense)
        name = f"naive BCD, {PASSES} passes"
        contenders[name] = keep(name, lambda: naive_bcd(keys, residual, LAMBDA, shape.experts, orders))
        once = [name] if not options.quick else []
    repeats = 2 if options.quick else options.repeats if tokens <= 100 else min(3, options.repeats)
    times = interleaved(contenders, repeats, once)
    ours = times[f"BCD, {PASSES} passes"]["seconds"]
    rows = []
    for name, timing in times.items():
        row = {
            "benchmark": "solvers", "model": shape.name, "device": options.device, "tokens": tokens, "solver": name,
            **timing, "against our BCD": timing["seconds"] / ours,
        }  # fmt: skip
        update = found.get(name)
        if isinstance(update, FactoredUpdate):
            row["objective"] = objective(keys, residual, LAMBDA, metric, update)
        elif isinstance(update, Tensor):
            row["objective"] = dense_objective(keys, residual, LAMBDA, update)
            row["difference to our BCD"] = relative_difference(update, found[f"BCD, {PASSES} passes"])
        rows.append(row)
    return rows


def dense_objective(keys: RoutedKeys, residual: Tensor, lambda_reg: float, delta: Tensor) -> float:
    """The objective at a dense ``[E, d, h]`` update, metric identity."""
    moved = torch.zeros_like(residual)
    for block in keys.design(torch.float32):
        moved.index_add_(0, block.rows, (delta[block.expert] @ block.z).T)
    penalty = sum(float((part.double() ** 2).sum()) for part in delta)
    return float(((residual - moved).double() ** 2).sum()) + lambda_reg * penalty


def relative_difference(dense: Tensor, update: FactoredUpdate) -> float:
    """``||dense - update|| / ||update||``, one expert at a time."""
    listed, lost, total = set(update.experts), 0.0, 0.0
    for expert, delta in update.deltas():
        lost += float(((dense[expert].double() - delta) ** 2).sum())
        total += float((delta**2).sum())
    lost += sum(float((dense[j].double() ** 2).sum()) for j in range(len(dense)) if j not in listed)
    return (lost / total) ** 0.5


def _bases(
    shape: ModelShape, view: MoELayerView, options: Options, low_ranks: bool
) -> tuple[list[dict[str, Any]], TuckerBasis]:
    """Tucker bases of one layer: at the ranks that ship, and at low ones by both methods."""
    matrices = view.layers[0].experts.matrices()
    draw = torch.randn(shape.d_hidden, 2 * shape.d_hidden, generator=torch.Generator().manual_seed(2))
    sigma = (draw @ draw.T / draw.shape[1]).double().to(options.device)
    low = (max(1, shape.ranks[0] // 2), max(1, shape.d_model // 32), max(1, shape.d_hidden // 16))
    cases = [(shape.ranks, "gram")]
    if low_ranks:
        cases += [(low, "gram"), (low, "randomised")]
    rows, shipped = [], None
    for ranks, method in cases:
        seconds, peak, basis = peak_of(
            lambda ranks=ranks, method=method: tucker_basis(
                matrices, *ranks, whitening="in", sigma_in=sigma, method=method
            )
        )
        shipped = shipped or basis
        rows.append(
            {
                "benchmark": "tucker basis", "model": shape.name, "device": options.device,
                "experts x d x h": f"{shape.experts} x {shape.d_model} x {shape.d_hidden}",
                "ranks": " x ".join(str(rank) for rank in ranks), "method": method, "seconds": seconds,
                "peak bytes": peak, "relative error": basis.relative_error,
            }
        )  # fmt: skip
    return rows, shipped


def _write_back(shape: ModelShape, view: MoELayerView, options: Options) -> list[dict[str, Any]]:
    """One write of a batch of 50 edits, originals kept, against one copy of the same layer's down-projections."""
    tokens = 6 if options.quick else 50
    keys, residual = random_keys(shape, tokens, options.device), random_residual(shape, tokens, options.device)
    # A residual that makes the update about half a percent of the weights, as an edit's is.
    update = solve_exact(keys, residual * 0.1, LAMBDA, IdentityMetric()).to(dtype=torch.float32)
    weights = next(iter(view.layers[0].experts.parameters()))[1].data
    writer: list[PatchWriter] = []

    def write() -> None:
        # The originals of the last call are let go of first, as the copy is.
        writer[:] = [PatchWriter(view)]
        writer[0].write(0, update)

    again = PatchWriter(view)
    again.write(0, update)
    contenders = {
        "copy": lambda: weights.clone(),
        "write, originals kept before": lambda: again.write(0, update),
        "write": write,
        "write and checksums": lambda: (write(), writer[0].checksums()),
    }
    times = interleaved(contenders, 2 if options.quick else options.repeats)
    return [
        {
            "benchmark": "write-back", "model": shape.name, "device": options.device, "dtype": str(weights.dtype)[6:],
            "way": name, "experts written": len(update.experts), **timing,
            "against one copy": timing["seconds"] / times["copy"]["seconds"],
        }
        for name, timing in times.items()
    ]  # fmt: skip
