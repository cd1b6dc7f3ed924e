"""Timing, the machine's description, and results on disk."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.allocations import tracked
from easyedit_moe import __version__
from easyedit_moe.measure import peak_memory_bytes, reset_peak_memory, synchronise
from easyedit_moe.storage.strict_json import write_json

ROOT = Path(__file__).parents[1]
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


@dataclass(frozen=True)
class Measured:
    """Seconds of one call, bytes at its peak and at its end beyond what was held before, and what it returned."""

    seconds: float
    peak: int
    left: int
    result: Any


def measured(run: Callable[[], Any]) -> Measured:
    """Measure one call.

    On a GPU by the allocator, on a CPU by the blocks that torch allocates (`benchmarks.allocations`, which says what it
    does not see): the memory of the process would not show what the allocator uses again.
    """
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        found, (seconds, result) = tracked(lambda: timed(run))
        return Measured(seconds, found.peak, found.left, result)
    reset_peak_memory()
    before = peak_memory_bytes()
    seconds, result = timed(run)
    peak = max(0, peak_memory_bytes() - before)
    reset_peak_memory()
    return Measured(seconds, peak, peak_memory_bytes() - before, result)


def peak_of(run: Callable[[], Any]) -> tuple[float, int, Any]:
    """Seconds of one call, bytes at its peak beyond what was held before, and what it returned; see `measured`."""
    found = measured(run)
    return found.seconds, found.peak, found.result


def source() -> dict[str, Any]:
    """Which code is being measured, and when.

    ``commit`` is None where the package does not lie in a git checkout; ``changed``: whether the code differs from it.
    """
    commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", "easyedit_moe", "benchmarks/*.py")
    return {
        "easyedit_moe": __version__,
        "commit": commit,
        "changed": None if commit is None else bool(changed),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def git(*words: str, checkout: Path = ROOT) -> str | None:
    """What git says in a checkout; None where there is no git, or no checkout."""
    try:
        done = subprocess.run(["git", *words], cwd=checkout, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


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


def write_results(
    folder: Path, quick: bool, suites: Mapping[str, list[dict[str, Any]]], made: Mapping[str, Any] | None = None
) -> Path:
    """Put the rows of the suites that ran into the machine's file; other suites' rows in it stay.

    Each suite's entry says on what machine and by which code (``made``, by default `source` now) its rows were made.
    """
    about = machine()
    path = results_path(folder, quick, about)
    kept = json.loads(path.read_text(encoding="utf-8"))["suites"] if path.exists() else {}
    by = dict(made or source())
    kept.update({name: {"machine": about, "source": by, "rows": rows} for name, rows in suites.items()})
    content = {"schema": SCHEMA, "quick": quick, "suites": kept}
    return write_json(path, content)
