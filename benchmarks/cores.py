"""What a run of MoTE's edits holds and writes: as Tucker cores, and with every expert's factors as before them."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.growth import random_basis
from benchmarks.harness import peak_of
from benchmarks.shapes import MODELS, QUICK, ModelShape, one_layer_model, random_keys, random_residual
from easyedit_moe.algebra.core import FactoredCore, solve_mote
from easyedit_moe.algebra.core_update import CoreUpdate, TuckerFactors, place_core
from easyedit_moe.algebra.nullspace import ExpertProjector, NullSpace
from easyedit_moe.algebra.routed_keys import FactoredUpdate
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches.weights import PatchWriter

EIGHTH = ModelShape("an eighth of qwen3-30b-a3b's widths", 128, 8, 256, 96, (64, 64, 32), (0,), 4)
LAMBDA = 1.0


@dataclass(frozen=True)
class Options:
    """One layer in bfloat16, batches of edits one after the other. On a CPU at an eighth of Qwen3-30B-A3B's widths."""

    quick: bool = False
    device: str = "cpu"
    tokens: str = "1,50"
    """Edits in a batch, T."""
    batches: str = "1,20"
    """Batches in a run."""
    protected: float = 0.1
    """Share of h that each expert's null space leaves out."""


def run(options: Options) -> list[dict[str, Any]]:
    """Rows of "a run of cores", one for each form."""
    if options.quick:
        options = replace(options, tokens="2", batches="1,3")
    shape = QUICK if options.quick else EIGHTH if options.device == "cpu" else MODELS["qwen3-30b-a3b"]
    rows = []
    for tokens in (int(part) for part in options.tokens.split(",")):
        for batches in (int(part) for part in options.batches.split(",")):
            factors = _factors(shape, options)
            cores = [_core(shape, tokens, number, factors, options.device) for number in range(batches)]
            for what in ("cores", "every expert's factors"):
                rows.append(_row(shape, tokens, cores, what, options))
    return rows


def _factors(shape: ModelShape, options: Options) -> TuckerFactors:
    draw, h = torch.Generator().manual_seed(2), shape.d_hidden
    seen = max(1, round(options.protected * h))
    vectors = (
        torch.linalg.qr(torch.randn(h, seen, generator=draw, dtype=torch.float64)).Q for _ in range(shape.experts)
    )
    space = NullSpace(tuple(ExpertProjector(vector.to(options.device), True) for vector in vectors))
    return TuckerFactors.of(random_basis(shape, options.device), space)


def _core(shape: ModelShape, tokens: int, seed: int, factors: TuckerFactors, device: str) -> CoreUpdate:
    keys, residual = random_keys(shape, tokens, device, seed), random_residual(shape, tokens, device)
    core = solve_mote(keys, residual, LAMBDA, factors.metric, random_basis(shape, device), "dual")
    if isinstance(core, FactoredCore):
        core = replace(core, u_expert=factors.expert)
    placed = place_core(core, factors)
    if isinstance(placed, FactoredUpdate):
        raise ValueError(f"{shape.name} keeps all expert directions, so an edit is no core.")
    return placed


def _row(shape: ModelShape, tokens: int, cores: list[CoreUpdate], what: str, options: Options) -> dict[str, Any]:
    view = MoELayerView(one_layer_model(shape, options.device))
    writer = PatchWriter(view)
    writer.keep(0, range(shape.experts))
    gc.collect()

    def write() -> None:
        for core in cores:
            writer.write(0, core if what == "cores" else core.expanded())

    seconds, peak, _ = peak_of(write)
    patch = writer.finish({}, model_fingerprint(view))
    with tempfile.TemporaryDirectory() as folder:
        patch.save(Path(folder) / "patch.safetensors")
        size = (Path(folder) / "patch.safetensors").stat().st_size
    return {
        "benchmark": "a run of cores", "device": options.device, "E": shape.experts, "d": shape.d_model,
        "h": shape.d_hidden, "T": tokens, "batches": len(cores), "what": what, "seconds": seconds, "peak bytes": peak,
        "held bytes": _held(update for _, update in patch.steps), "file bytes": size,
    }  # fmt: skip


def _held(updates: Iterable[CoreUpdate | FactoredUpdate]) -> int:
    """Of what the steps hold, each tensor once; the layer's own factors, which the editor holds, are not counted."""
    found: dict[int, int] = {}
    for update in updates:
        if isinstance(update, FactoredUpdate):
            parts: list[Tensor] = [update.left, *update.columns, *update.right]
        else:
            core = update.core
            parts = [core] if isinstance(core, Tensor) else [core.left, core.expert, core.inner]
        found.update({part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts})
    return sum(found.values())
