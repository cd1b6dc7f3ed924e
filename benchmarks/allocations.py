"""Bytes that torch allocates, block by block: the peak of a run, and of each of its stages.

Torch's profiler reports every block that its allocators hand out and take back, on the CPU and on CUDA, temporaries
inside of an operation included. What it does not see: memory that libraries take for themselves (MKL's and LAPACK's
workspace beyond what torch allocates for them, cuBLAS's on a GPU), files that are mapped, numpy's and Python's own
objects; and blocks from before the run, so that giving these back counts for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

REST = "rest"
"""The stage of what is allocated outside of all stages."""
_MARK = "stage: "


@dataclass(frozen=True)
class Allocations:
    """What a run allocated.

    Attributes:
        peak: bytes at the peak, beyond what was there before.
        left: bytes that are still there at the end.
        peaks: stage -> bytes at the peak of what was allocated in it, whenever that is: what stays of it to the end of
            the run, and what is given back sooner.
    """

    peak: int
    left: int
    peaks: dict[str, int]


@contextmanager
def stage(name: str) -> Iterator[None]:
    """What is allocated inside belongs to a stage of the `tracked` run; of nested ones to the innermost."""
    with record_function(_MARK + name):
        yield


def tracked(run: Callable[[], Any]) -> tuple[Allocations, Any]:
    """The allocations of one call, and what it returned, which still exists when they are counted."""
    kinds = [ProfilerActivity.CPU]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds, profile_memory=True) as found:
        result = run()
    return _counted(found.profiler.kineto_results.experimental_event_tree()), result


def _counted(roots: list[Any]) -> Allocations:
    held: dict[tuple[str, int], tuple[str, int]] = {}
    inside, now, peaks, total, peak = [REST], dict[str, int](), dict[str, int](), 0, 0
    for _, _, what in sorted(_changes(roots), key=lambda one: one[:2]):
        if isinstance(what, str):
            inside.append(what)
        elif what is None:
            inside.pop()
        elif what[1] > 0:
            block, size = what
            name = inside[-1]
            held[block] = (name, size)
            now[name] = now.get(name, 0) + size
            total += size
            peaks[name] = max(peaks.get(name, 0), now[name])
            peak = max(peak, total)
        elif what[0] in held:
            name, size = held.pop(what[0])
            now[name] -= size
            total -= size
    return Allocations(peak, total, peaks)


def _changes(roots: list[Any]) -> Iterator[tuple[int, int, Any]]:
    """Time, rank at the same time, and what happens: a stage begins (its name) or ends (None), or a block's bytes.

    By time and not by what is inside what, as gradients on a GPU are computed by threads of their own.
    """
    waiting = list(roots)
    while waiting:
        event = waiting.pop()
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            yield event.start_time_ns, 1, ((str(fields.device), fields.ptr), fields.alloc_size)
        elif event.name.startswith(_MARK):
            yield event.start_time_ns, 0, event.name.removeprefix(_MARK)
            yield event.end_time_ns, 2, None
        waiting += event.children
