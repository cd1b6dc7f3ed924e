"""Wall time per stage and peak memory of an edit."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STAGES = ("statistics", "targets", "solve", "write", "diagnose", "evaluate")


class Stopwatch:
    """Seconds per stage; work on a GPU is waited for."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``name``."""
        synchronise()
        start = time.perf_counter()
        try:
            yield
        finally:
            synchronise()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def synchronise() -> None:
    """Wait for the work on a GPU, where one is in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def reset_peak_memory() -> None:
    """Start a new peak: on every GPU, or, on Linux, of the process's resident memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_bytes() -> int:
    """Bytes at the peak since `reset_peak_memory`: allocated on all GPUs, or resident in the process.

    Where the system can't reset the peak (outside Linux), it is that of the whole process so far.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return sum(torch.cuda.max_memory_allocated(d) for d in range(torch.cuda.device_count()))
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """Bytes of this process in main memory now; 0 outside Linux."""
    return _status("VmRSS")


def _status(entry: str) -> int:
    """Bytes of an entry of the process's status, 0 where the system has none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:"))
