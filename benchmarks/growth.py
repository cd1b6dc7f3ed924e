"""How time and memory grow with the number of experts, edits, layers and edits already made; memory beside its plan."""

from __future__ import annotations

import gc
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from benchmarks import held
from benchmarks.end_to_end import random_model, requests
from benchmarks.harness import interleaved, peak_of
from benchmarks.shapes import MODELS, QUICK, ModelShape, one_layer_model, random_keys, random_residual
from easyedit_moe import factworld
from easyedit_moe.algebra.bcd import expert_orders, solve_bcd
from easyedit_moe.algebra.core import solve_mote
from easyedit_moe.algebra.core_update import TuckerFactors, place_core
from easyedit_moe.algebra.exact import solve_exact
from easyedit_moe.algebra.metric import IdentityMetric
from easyedit_moe.algebra.routed_keys import FactoredUpdate
from easyedit_moe.algebra.tucker import TuckerBasis
from easyedit_moe.editors import make_editor
from easyedit_moe.editors.stages import bcd_bytes, exact_bytes, mote_bytes
from easyedit_moe.errors import EditingWarning
from easyedit_moe.hparams import load_hyperparams
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches.groups import tile_size
from easyedit_moe.patches.weights import PatchWriter
from easyedit_moe.targets.search import TargetVectors

HALF = ModelShape("half of qwen3-30b-a3b", 64, 8, 1024, 384, (32, 256, 96), (3, 4, 5), 4)
LAMBDA = 1.0


@dataclass(frozen=True)
class Options:
    """On a CPU at half of Qwen3-30B-A3B's width and experts, on CUDA at its own shape."""

    quick: bool = False
    device: str = "cpu"
    experts: str = "16,32,64,128,256,512"
    """Numbers of experts E."""
    tokens: str = "1,10,100,1000,10000"
    """Edits solved together, T."""
    made: str = "0,200,1000,4000"
    """Edits made before, which are remembered; see `benchmarks.held`."""
    layers: str = "1,2,3,4,5,6"
    """Numbers of critical layers."""
    passes: int = 4
    repeats: int = 3


def run(options: Options) -> list[dict[str, Any]]:
    """Rows of "growth with E", "growth with T", "growth with edits made" and "growth with layers"."""
    if options.quick:
        options = replace(options, experts="4,8", tokens="1,8", made="0,40", layers="1", repeats=1)
    shape = QUICK if options.quick else HALF if options.device == "cpu" else MODELS["qwen3-30b-a3b"]
    rows = []
    for experts in _numbers(options.experts):
        ranks = (min(experts, shape.ranks[0]), *shape.ranks[1:])
        wide = replace(shape, experts=experts, active=min(experts, shape.active), ranks=ranks)
        rows += _solve("growth with E", wide, 8 if options.quick else 200, options)
        rows.append(_write(wide, options))
    for tokens in _numbers(options.tokens):
        rows += _solve("growth with T", shape, tokens, options)
    basis, new = random_basis(shape, options.device), 4 if options.quick else 50
    for made in _numbers(options.made):
        rows += held.run(shape, new, made, basis, LAMBDA, options.repeats, options.device)
    return rows + _layers(options)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _solve(benchmark: str, shape: ModelShape, tokens: int, options: Options) -> list[dict[str, Any]]:
    """Seconds and bytes of every solver."""
    keys = random_keys(shape, tokens, options.device)
    residual = random_residual(shape, tokens, options.device)
    metric, basis = IdentityMetric(), random_basis(shape, options.device)
    factors = TuckerFactors.of(basis, metric)
    orders = expert_orders(shape.experts, options.passes)
    sizes = shape.planned()
    contenders: dict[str, tuple[Callable[[], Any], tuple[int, str]]] = {
        "exact": (lambda: solve_exact(keys, residual, LAMBDA, metric), exact_bytes(sizes, tokens, "identity")),
        f"BCD, {options.passes} passes": (
            lambda: solve_bcd(keys, residual, LAMBDA, metric, orders),
            bcd_bytes(sizes, tokens, "identity"),
        ),
        "MoTE": (
            lambda: place_core(solve_mote(keys, residual, LAMBDA, metric, basis), factors),
            mote_bytes(sizes, tokens, *shape.ranks),
        ),
    }
    peaks = {}
    for name, (solve, _) in contenders.items():
        gc.collect()
        peaks[name] = peak_of(solve)[:2]
    if tokens > 1000:  # a run takes many seconds, so the one that was measured for its memory counts
        times = {name: {"seconds": seconds, "runs": 1} for name, (seconds, _) in peaks.items()}
    else:
        times = interleaved({name: solve for name, (solve, _) in contenders.items()}, options.repeats)
    return [
        {
            "benchmark": benchmark, "device": options.device, "E": shape.experts, "d": shape.d_model,
            "h": shape.d_hidden, "T": tokens, "what": name, "form": planned[1],
            "seconds": times[name]["seconds"], "runs": times[name]["runs"], "peak bytes": peaks[name][1],
            "planned bytes": planned[0],
        }
        for name, (_, planned) in contenders.items()
    ]  # fmt: skip


def random_basis(shape: ModelShape, device: str) -> TuckerBasis:
    """Orthonormal factors of the shape's ranks."""

    def factor(size: int, rank: int) -> Tensor:
        draw = torch.randn(size, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
        return torch.linalg.qr(draw).Q.to(device)

    sizes = (shape.experts, shape.d_model, shape.d_hidden)
    return TuckerBasis(*(factor(size, rank) for size, rank in zip(sizes, shape.ranks, strict=True)), 0.0)


def _write(shape: ModelShape, options: Options) -> dict[str, Any]:
    """One write of a rank-4 update to every expert; the plan is the originals and three tiles."""
    view = MoELayerView(one_layer_model(shape, options.device))
    draw = torch.Generator().manual_seed(3)
    right = [torch.randn(shape.d_hidden, 4, generator=draw).to(options.device) for _ in range(shape.experts)]
    left = (torch.randn(shape.d_model, 4, generator=draw) * 1e-4).to(options.device)
    columns = (torch.arange(4, device=options.device),) * shape.experts
    update = FactoredUpdate(left, tuple(range(shape.experts)), columns, tuple(right))
    gc.collect()
    _, peak, _ = peak_of(lambda: _written(view, update))
    times = interleaved({"write": lambda: _written(view, update)}, options.repeats)
    weights = next(iter(view.layers[0].experts.parameters()))[1]
    return {
        "benchmark": "growth with E", "device": options.device, "E": shape.experts, "d": shape.d_model,
        "h": shape.d_hidden, "what": "write", "form": "all experts", "seconds": times["write"]["seconds"],
        "runs": times["write"]["runs"], "peak bytes": peak,
        "planned bytes": weights.nbytes + 3 * 4 * min(weights.numel(), tile_size(weights.device)),
    }  # fmt: skip


def _written(view: MoELayerView, update: FactoredUpdate) -> PatchWriter:
    writer = PatchWriter(view)
    writer.write(0, update)
    return writer


def _layers(options: Options) -> list[dict[str, Any]]:
    """One batch of edits with z ready, on a scaled model, at more and more layers."""
    tok = hf.AutoTokenizer.from_pretrained(str(factworld.model_path()))
    model = random_model("", options.device, True, len(tok))
    facts = requests(4 if options.quick else 50)
    rows = []
    with tempfile.TemporaryDirectory() as stats, warnings.catch_warnings():
        warnings.simplefilter("ignore", EditingWarning)
        for count in _numbers(options.layers):
            for method in ("Global", "MoTE"):
                values = {
                    "device": options.device, "stats_dir": stats, "mom2_dataset": "factworld", "dtype": "float32",
                    "mom2_n_samples": 40, "max_length": 128, "layers": list(range(count)), "spread": "residual",
                }  # fmt: skip
                if method == "MoTE":
                    values |= {"rank_expert": 0.5, "rank_out": 0.25, "rank_in": 0.33}
                editor = make_editor(load_hyperparams(f"{method}/qwen3-30b-a3b", **values))
                editor.prepare(model, tok)
                nothing = torch.zeros(len(facts))
                shift = torch.randn(len(facts), 256, generator=torch.Generator().manual_seed(0)) * 0.1
                targets = TargetVectors(shift.to(model.device), nothing, nothing, nothing.bool(), nothing.long())

                def edit(editor: Any = editor, targets: TargetVectors = targets) -> None:
                    result = editor.edit(model, tok, facts, None, targets)
                    result.patch.restore(model)

                times = interleaved({method: edit}, options.repeats)
                rows.append(
                    {
                        "benchmark": "growth with layers", "device": options.device, "layers": count, "T": len(facts),
                        "what": method, "seconds": times[method]["seconds"], "runs": times[method]["runs"],
                    }
                )  # fmt: skip
    return rows
