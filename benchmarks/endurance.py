"""Hundreds of edits one after the other: time of each, memory and disk all along, and the way back to the first bit.

Each method runs with and without ``remember_edits``, every series in a process of its own: resident memory would
otherwise be that of the series before, too.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from benchmarks.end_to_end import random_model, requests
from easyedit_moe import factworld
from easyedit_moe.editor import MoEEditor
from easyedit_moe.errors import EditingWarning
from easyedit_moe.hparams import load_hyperparams
from easyedit_moe.measure import resident_bytes
from easyedit_moe.storage.checksums import checksum

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """Sequential edits of the scaled model by the method's own search of targets, all kept and then undone."""

    quick: bool = False
    device: str = "cpu"
    methods: str = "Global,MoTE,MoEEdit-BCD"
    remember: str = "no,yes"
    """Whether earlier edits are held in place (``remember_edits``)."""
    edits: int = 500
    """Edits one by one."""
    batches: int = 100
    size: int = 5
    """Edits in a batch."""
    steps: int = 3
    """Of the search of each target."""
    parts: int = 10
    """Rows of each table; a row is the mean over its part of the edits."""


@dataclass(frozen=True)
class Series:
    """``count`` batches of ``size`` edits each by one method."""

    benchmark: str
    method: str
    remember: bool
    count: int
    size: int


def run(options: Options) -> Rows:
    """Rows of "edits one by one" and "batches of edits", of each series the last the undoing of all.

    A row of "first and last edits" for each series that was made one by one says what of it is asked most.
    """
    if options.quick:
        few = {"edits": 6, "batches": 3, "size": 2, "steps": 1, "parts": 3}
        options = replace(options, **few, methods="MoTE", remember="yes")
    rows: Rows = []
    for series in _all_series(options):
        rows += _made(options, series) if options.quick else _apart(options, series)
    return rows + first_and_last(rows)


def first_and_last(rows: Rows) -> Rows:
    """Seconds of an edit in the first and the last part of each series of edits one by one, and memory after both."""
    series: dict[tuple[str, bool], Rows] = {}
    for row in rows:
        if row["benchmark"] == "edits one by one" and row["made"]:
            series.setdefault((row["what"], row["remember_edits"]), []).append(row)
    return [
        {
            "benchmark": "first and last edits", "device": parts[0]["device"], "what": method,
            "remember_edits": remember, "part": parts[0]["made"], "edits": parts[-1]["made"],
            "seconds of the first": parts[0]["seconds"], "seconds of the last": parts[-1]["seconds"],
            "last / first": parts[-1]["seconds"] / parts[0]["seconds"],
            "resident bytes after the first": parts[0]["resident bytes"],
            "resident bytes after the last": parts[-1]["resident bytes"],
        }
        for (method, remember), parts in series.items()
    ]  # fmt: skip


def _all_series(options: Options) -> Iterator[Series]:
    for method in options.methods.split(","):
        for remember in options.remember.split(","):
            yield Series("edits one by one", method, remember == "yes", options.edits, 1)
            yield Series("batches of edits", method, remember == "yes", options.batches, options.size)


def _apart(options: Options, series: Series) -> Rows:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_with_threads, torch.get_num_threads(), options, series).result()


def _with_threads(threads: int, options: Options, series: Series) -> Rows:
    torch.set_num_threads(threads)
    return _made(options, series)


def _made(options: Options, series: Series) -> Rows:
    tok = hf.AutoTokenizer.from_pretrained(str(factworld.model_path()))
    model = random_model("", options.device, True, len(tok))
    count, size = series.count, series.size
    facts, before, rows = requests(count * size), _state(model), []
    part = -(-count // options.parts)
    with tempfile.TemporaryDirectory() as stats, warnings.catch_warnings():
        warnings.simplefilter("ignore", EditingWarning)
        editor = _editor(options, series, model, tok, stats)

        def row(made: int, seconds: float, **more: Any) -> dict[str, Any]:
            disk = sum(file.stat().st_size for file in Path(stats).rglob("*") if file.is_file())
            return {
                "benchmark": series.benchmark, "device": options.device, "what": series.method,
                "remember_edits": series.remember, "size": size, "made": made, "seconds": seconds,
                "resident bytes": resident_bytes(), "disk bytes": disk, **more,
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


def _editor(options: Options, series: Series, model: nn.Module, tok: Any, stats: str) -> MoEEditor:
    values = {
        "device": options.device, "stats_dir": stats, "mom2_dataset": "factworld", "dtype": "float32", "layers": [1, 2],
        "mom2_n_samples": 40, "max_length": 128, "v_num_grad_steps": options.steps, "batch_size": series.size,
        "remember_edits": series.remember,
    }  # fmt: skip
    if series.method == "MoTE":
        values |= {"rank_expert": 0.5, "rank_out": 0.25, "rank_in": 0.33}
    return MoEEditor(load_hyperparams(f"{series.method}/qwen3-30b-a3b", **values), model, tok)


def _state(model: nn.Module) -> dict[str, int]:
    tensors: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    return {name: checksum(tensor.detach()) for name, tensor in tensors}
