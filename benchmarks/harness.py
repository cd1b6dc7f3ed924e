"""Timing, the machine's description, and results on disk."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.allocations import tracked
from easyedit_moe import __version__
from easyedit_moe.measure import peak_memory_bytes, reset_peak_memory, synchronise
from easyedit_moe.storage.strict_json import write_json

RESULTS = Path(__file__).parent / "results"
SCHEMA = 1


def interleaved(
    contenders: Mapping[str, Callable[[], Any]], repeats: int = 5, once: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Seconds of each contender: one warm-up each, then ``repeats`` rounds in which all take their turn.

    Contenders in ``once`` take minutes: they run a single time, without a warm-up. Returns the median, the least and
    the most seconds, and the number of runs, by contender.
    """
    for name, run in contenders.items():
        if name not in once:
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats):
        for name, run in contenders.items():
            if turn == 0 or name not in once:
                seconds[name].append(timed(run)[0])
    return {
        name: {"seconds": statistics.median(s), "least": min(s), "most": max(s), "runs": len(s)}
        for name, s in seconds.items()
    }


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, work on a GPU included, and what it returned."""
    synchronise()
    start = time.perf_counter()
    result = run()
    synchronise()
    return time.perf_counter() - start, result


def peak_of(run: Callable[[], Any]) -> tuple[float, int, Any]:
    """Seconds of one call, bytes at its peak beyond what was held before, and what it returned.

    On a GPU by the allocator, on a CPU by the blocks that torch allocates (`benchmarks.allocations`, which says what it
    does not see): the memory of the process would not show what the allocator uses again.
    """
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        found, (seconds, result) = tracked(lambda: timed(run))
        return seconds, found.peak, result
    reset_peak_memory()
    before = peak_memory_bytes()
    seconds, result = timed(run)
    return seconds, max(0, peak_memory_bytes() - before), result


def machine() -> dict[str, Any]:
    """What timings depend on; nothing that names a host."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "easyedit_moe": __version__,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE)
        if names:
            return names[0].strip()
    return platform.processor() or platform.machine()


def results_path(folder: Path, quick: bool, about: Mapping[str, Any]) -> Path:
    """One file per machine: CPU, cores and GPU in its name; reduced runs apart."""
    parts = [about["cpu"], f"{about['cores']}-cores", about.get("gpu", "")]
    label = re.sub(r"[^a-z0-9]+", "-", " ".join(p for p in parts if p).lower()).strip("-")
    return folder / f"{label}{'-quick' if quick else ''}.json"


def write_results(folder: Path, quick: bool, suites: Mapping[str, list[dict[str, Any]]]) -> Path:
    """Put the rows of the suites that ran into the machine's file; other suites' rows in it stay."""
    about = machine()
    path = results_path(folder, quick, about)
    kept = json.loads(path.read_text(encoding="utf-8"))["suites"] if path.exists() else {}
    kept.update({name: {"machine": about, "rows": rows} for name, rows in suites.items()})
    content = {"schema": SCHEMA, "quick": quick, "suites": kept}
    return write_json(path, content)
