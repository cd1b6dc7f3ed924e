"""1000 edits in batches of 50 of Qwen3-30B-A3B's shape in bfloat16: is the peak at most the model and 10 % of it?

"peak by plan" is arithmetic at the full shape on a GPU, for every method. "peak measured" counts blocks (as the suite
``plan`` does) at a part of the widths, with all 128 experts and fewer layers: statistics, metric, basis, a search of
targets for the first batch (at the batch size by which the plan fits) and all edits with their patches kept. What is
measured at three widths is split into what is fixed (tiles and chunks of a fixed size, which weigh more in a small
model), what grows with the share s of the widths (states of tokens) and what grows with its square (weights, moments):
a + b s + c s^2, for preparing and for editing, each; "peak at full width" is the larger one at s = 1. Null spaces take
half of h, the most that they can keep.
"""

from __future__ import annotations

import gc
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn

from benchmarks.end_to_end import requests
from benchmarks.gpu_model import FULL, LAYERS, StandIn
from benchmarks.harness import measured
from benchmarks.plan import METHODS, corpus_texts
from easyedit_moe import factworld
from easyedit_moe.editors import make_editor
from easyedit_moe.editors.planner import MemoryPlan, Workload, plan
from easyedit_moe.errors import EditingWarning
from easyedit_moe.hparams import SolverHyperParams, load_hyperparams
from easyedit_moe.moe.holding import intact
from easyedit_moe.moe.shapes import shapes_of
from easyedit_moe.patches.applied_run import AppliedRun
from easyedit_moe.targets.search import TargetVectors

ROOM = 0.1
"""Share of the model's bytes that may be taken beyond them."""
BY_PLAN, MEASURED, AT_FULL = "peak by plan", "peak measured", "peak at full width"
NOT_EDITS = ("moments", "statistics", "metric", "basis", "directions", "targets")


@dataclass(frozen=True)
class Options:
    """``scales`` are what the widths are divided by; three."""

    edits: int = 1000
    batch_size: int = 50
    methods: str = METHODS
    """Of the arithmetic."""
    measured: str = "Global,MoEEdit-BCD,MoTE"
    """Methods that are run."""
    scales: str = "16,8,4"
    layers: int = 8
    """Of the models that are run; the critical ones are the third to the seventh, as shipped."""
    texts: int = 65
    """Of the statistics, each as long as texts get."""
    device: str = "cpu"
    quick: bool = False


def run(options: Options) -> list[dict[str, Any]]:
    """Rows of "peak by plan", "peak measured" and "peak at full width"."""
    if options.quick:
        methods = "Global,MoTE,MoE-FT-L"
        options = Options(4, 2, methods, "MoTE", "32,16,8", texts=8, device=options.device, quick=True)
    rows = [planned(method, options.edits, options.batch_size) for method in options.methods.split(",")]
    tok = hf.AutoTokenizer.from_pretrained(str(factworld.model_path()))
    for method in options.measured.split(","):
        found = [_measured(method, int(scale), tok, options) for scale in options.scales.split(",")]
        rows += [*found, at_full_width(found)]
    return rows


def planned(method: str, edits: int, batch: int) -> dict[str, Any]:
    """Of one method at the full shape: with default sizes, with target vectors given, and within the room."""
    hparams, model = load_hyperparams(f"{method}/qwen3-30b-a3b"), _meta(StandIn(1, LAYERS, "meta", 0), LAYERS)
    usual = _plan(hparams, model, edits, batch)
    weights = usual.shapes.parameters
    fitted = _plan(hparams, model, edits, batch, int((1 + ROOM) * weights))
    name, peak = _largest(usual)
    ready = [p for stage, p in zip(usual.stages, usual.peaks(), strict=True) if stage.name not in NOT_EDITS]
    fitted_name, fitted_peak = _largest(fitted)
    return {
        "benchmark": BY_PLAN, "method": method, "edits": edits, "batch": batch, "model bytes": weights,
        "largest stage": name, "beyond the model": peak - weights, "peak / model": peak / weights,
        "z ready, edits alone / model": max(ready) / weights, "largest stage within the room": fitted_name,
        "within the room / model": fitted_peak / weights, "fits": fitted.fits,
        "target_batch_size": fitted.settings.get("target_batch_size"),
        "capture_batch_size": fitted.settings.get("capture_batch_size"),
    }  # fmt: skip


def at_full_width(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the rows of three widths come to at the full ones and all layers."""
    weights = _bytes(_meta(StandIn(1, LAYERS, "meta", 0), LAYERS))
    shares = [1 / row["widths divided by"] for row in rows]
    peaks = {
        "preparing": parts(shares, [row["peak of preparing"] for row in rows]),
        "editing": parts(shares, [row["prepared"] + row["peak of edits"] for row in rows]),
    }
    stage = max(peaks, key=lambda name: sum(peaks[name]))
    fixed, widths, squares = peaks[stage]
    beyond = fixed + widths + squares
    return {
        "benchmark": AT_FULL, "method": rows[0]["method"], "edits": rows[0]["edits"], "batch": rows[0]["batch"],
        "of widths divided by": ", ".join(str(row["widths divided by"]) for row in rows), "model bytes": weights,
        "largest": stage, "fixed bytes": fixed, "bytes by the widths": widths, "bytes by their square": squares,
        "editing / model": 1 + sum(peaks["editing"]) / weights,
        "beyond the model": beyond, "peak / model": 1 + beyond / weights, "within": beyond <= ROOM * weights,
    }  # fmt: skip


def parts(shares: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """a, b and c of ``a + b s + c s^2`` through three values."""
    powers = torch.tensor([[1.0, share, share**2] for share in shares], dtype=torch.float64)
    fixed, widths, squares = torch.linalg.solve(powers, torch.tensor(values, dtype=torch.float64)).tolist()
    return fixed, widths, squares


def _plan(hparams: Any, model: nn.Module, edits: int, batch: int, budget: int | None = None) -> MemoryPlan:
    """Of the last batch, in which solvers' patches of all batches are kept."""
    if isinstance(hparams, SolverHyperParams):
        shapes = shapes_of(model, hparams.layers, hparams.site)
        batches = -(-edits // batch)
        return plan(shapes, hparams, batch, edits - batch, budget=budget, device="cuda", batches=batches)
    work = Workload(batch, edits - batch, budget, "cuda")
    return make_editor(hparams, progress=False).plan_for(hparams, model, work)


def _largest(found: MemoryPlan) -> tuple[str, int]:
    peaks = found.peaks()
    at = max(range(len(peaks)), key=peaks.__getitem__)
    return found.stages[at].name, peaks[at]


def _meta(stand_in: StandIn, layers: int) -> hf.PreTrainedModel:
    with torch.device("meta"):
        return hf.AutoModelForCausalLM.from_config(stand_in.config(layers), dtype=torch.bfloat16)


def _bytes(model: nn.Module) -> int:
    return sum(weight.nbytes for weight in model.parameters())


def _measured(method: str, scale: int, tok: Any, options: Options) -> dict[str, Any]:
    stand_in = StandIn(scale, options.layers, options.device, len(tok), experts=FULL["num_experts"])
    model = stand_in.build()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", EditingWarning)  # random weights: thin coverage and missed targets
        editor = make_editor(_hparams(method, Path(folder), options), progress=False)
        gc.collect()
        prepared = measured(lambda: editor.prepare(model, tok))
        edited = measured(lambda: _edit(editor, model, tok, options))
    weights, whole = _bytes(model), _bytes(_meta(stand_in, LAYERS))
    beyond = max(prepared.peak, prepared.left + edited.peak)
    return {
        "benchmark": MEASURED, "device": options.device, "method": method, "edits": options.edits,
        "batch": options.batch_size, "widths divided by": scale, "layers": options.layers, "model bytes": weights,
        "peak of preparing": prepared.peak, "prepared": prepared.left, "peak of edits": edited.peak,
        "beyond the model": beyond, "peak / model": 1 + beyond / weights,
        f"peak / model of {LAYERS} layers": 1 + beyond / whole,
    }  # fmt: skip


def _hparams(method: str, folder: Path, options: Options) -> Any:
    """As shipped, at ranks in the same proportions and at the batch sizes by which the plan of the full shape fits."""
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(corpus_texts(options.texts)), encoding="utf-8")
    sizes = planned(method, options.edits, options.batch_size)
    values: dict[str, Any] = {
        "device": options.device, "dtype": "bfloat16", "stats_dir": str(folder), "mom2_dataset": str(corpus),
        "mom2_n_samples": options.texts, "coverage_target": None, "batch_size": options.batch_size,
        "nullspace_rank": 0.5, "nullspace_threshold": None, "v_num_grad_steps": 2, "early_stop_loss": 0.0,
        "max_length": 32 if options.quick else 512,
        "target_batch_size": sizes["target_batch_size"], "capture_batch_size": sizes["capture_batch_size"],
    }  # fmt: skip
    if method == "MoTE":
        values |= {"rank_expert": 0.5, "rank_out": 0.25, "rank_in": 0.33}
    return load_hyperparams(f"{method}/qwen3-30b-a3b", **values)


def _edit(editor: Any, model: hf.PreTrainedModel, tok: Any, options: Options) -> AppliedRun:
    """All batches, each on the ones before and all patches kept; then put back. Targets of the first are searched."""
    facts, size, memory = requests(options.edits), options.batch_size, None
    draw = torch.Generator().manual_seed(0)
    with intact(model) as hold:
        run_ = AppliedRun(model, hold)
        for start in range(0, len(facts), size):
            batch = facts[start : start + size]
            given = _given(len(batch), model, draw) if start else None
            result = editor.edit(model, tok, batch, memory, given)
            memory = result.memory
            run_.add(result.patch)
        run_.restore()
    return run_


def _given(count: int, model: hf.PreTrainedModel, draw: torch.Generator) -> TargetVectors:
    shift = torch.randn(count, model.config.hidden_size, generator=draw) * 0.1
    nothing = torch.zeros(count)
    return TargetVectors(shift.to(model.device), nothing, nothing, nothing.bool(), nothing.long())
