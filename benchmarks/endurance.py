"""Hundreds of edits one after the other: time of each, memory and disk all along, and the way back to the first bit."""

from __future__ import annotations

import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers as hf
from torch import Tensor, nn

from benchmarks.end_to_end import random_model, requests
from easyedit_moe import factworld
from easyedit_moe.editor import MoEEditor
from easyedit_moe.errors import EditingWarning
from easyedit_moe.hparams import load_hyperparams
from easyedit_moe.measure import resident_bytes
from easyedit_moe.storage.checksums import checksum


@dataclass(frozen=True)
class Options:
    """Sequential edits of the scaled model by the method's own search of targets, all kept and then undone."""

    quick: bool = False
    device: str = "cpu"
    method: str = "Global"
    edits: int = 500
    """Edits one by one."""
    batches: int = 100
    size: int = 5
    """Edits in a batch."""
    steps: int = 3
    """Of the search of each target."""
    parts: int = 10
    """Rows of each table; a row is the mean over its part of the edits."""


def run(options: Options) -> list[dict[str, Any]]:
    """Rows of "edits one by one" and "batches of edits"; the last of each is the undoing of all."""
    if options.quick:
        options = replace(options, edits=6, batches=3, size=2, steps=1, parts=3)
    return [
        *_series("edits one by one", options, options.edits, 1),
        *_series("batches of edits", options, options.batches, options.size),
    ]


def _series(benchmark: str, options: Options, count: int, size: int) -> list[dict[str, Any]]:
    tok = hf.AutoTokenizer.from_pretrained(str(factworld.model_path()))
    model = random_model("", options.device, True, len(tok))
    facts, before, rows = requests(count * size), _state(model), []
    part = -(-count // options.parts)
    with tempfile.TemporaryDirectory() as stats, warnings.catch_warnings():
        warnings.simplefilter("ignore", EditingWarning)
        editor = _editor(options, model, tok, stats, size)

        def row(made: int, seconds: float, **more: Any) -> dict[str, Any]:
            disk = sum(file.stat().st_size for file in Path(stats).rglob("*") if file.is_file())
            return {
                "benchmark": benchmark, "device": options.device, "what": options.method, "size": size, "made": made,
                "seconds": seconds, "resident bytes": resident_bytes(), "disk bytes": disk, **more,
            }  # fmt: skip

        for first in range(0, count, part):
            numbers = range(first, min(first + part, count))
            start = time.perf_counter()
            for number in numbers:
                chosen = facts[number * size : (number + 1) * size]
                editor.batch_edit(requests=chosen, sequential_edit=True, verbose=False)
            rows.append(row(numbers[-1] + 1, (time.perf_counter() - start) / len(numbers)))
        start = time.perf_counter()
        editor.undo(len(editor.patches))
        rows.append(row(0, (time.perf_counter() - start) / count, **{"as before": _state(model) == before}))
    return rows


def _editor(options: Options, model: nn.Module, tok: Any, stats: str, size: int) -> MoEEditor:
    values = {
        "device": options.device, "stats_dir": stats, "mom2_dataset": "factworld", "dtype": "float32", "layers": [1, 2],
        "mom2_n_samples": 40, "max_length": 128, "v_num_grad_steps": options.steps, "batch_size": size,
    }  # fmt: skip
    return MoEEditor(load_hyperparams(f"{options.method}/qwen3-30b-a3b", **values), model, tok)


def _state(model: nn.Module) -> dict[str, int]:
    tensors: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    return {name: checksum(tensor.detach()) for name, tensor in tensors}
