"""SIGINT at every line of this package that some work executes, and what is left of the work afterwards.

The signal is raised from a tracing function before a line runs, so Python's own handler, or the one that stands in for
it, gets it there. A line counts where it was executed for the first time and where for the last.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import easyedit_moe

SOURCE = str(Path(easyedit_moe.__file__).parent)
Place = tuple[str, int]


@dataclass(frozen=True)
class Work:
    """Something that is interrupted again and again.

    Attributes:
        name: in the table.
        model: that it works on.
        act: the work.
        label: which of its states the model is in, by what is recorded of it, such as the number of patches.
        reset: back to the state from which ``act`` starts, by what is recorded, such as by undoing a patch.
    """

    name: str
    model: nn.Module
    act: Callable[[], object]
    label: Callable[[], Hashable] = lambda: None
    reset: Callable[[], object] = lambda: None


@dataclass
class Swept:
    """What became of one work: interrupts tried, interrupts after which all was right, and the others."""

    name: str
    lines: int = 0
    tried: int = 0
    undone: int = 0
    kept: int = 0
    bad: list[str] = field(default_factory=list)


def executed(act: Callable[[], object]) -> list[Place]:
    """File and line of each line event of this package, in order."""
    seen: list[Place] = []
    _traced(act, lambda place: seen.append(place))
    return seen


def points(events: list[Place]) -> list[int]:
    """Numbers of the events at which a line is executed for the first time, and for the last."""
    first: dict[Place, int] = {}
    last: dict[Place, int] = {}
    for number, place in enumerate(events):
        first.setdefault(place, number)
        last[place] = number
    return sorted({*first.values(), *last.values()})


def sweep(work: Work, stride: int = 1, offset: int = 0) -> Swept:
    """Interrupt ``work`` at every ``stride``-th of its points, beginning with number ``offset``."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores SIGINT
    try:
        return _swept(work, stride, offset)
    finally:
        signal.signal(signal.SIGINT, handler)


def _swept(work: Work, stride: int, offset: int) -> Swept:
    found = Swept(work.name)
    before = _known(work)
    events = executed(work.act)
    after = _known(work)
    wanted = {before[0]: before[1], after[0]: after[1]}
    work.reset()
    _check(found, work, {before[0]: before[1]}, "after the undisturbed run")
    found.lines = len(set(events))
    for number in points(events)[offset::stride]:
        found.tried += 1
        place = f"{Path(events[number][0]).relative_to(SOURCE)}:{events[number][1]}"
        error = _interrupted(work.act, number)
        if error is not None:
            found.bad.append(f"{place}: {error}")
        found.kept += work.label() != before[0]
        _check(found, work, wanted, place)
        try:
            work.reset()
        except Exception as raised:
            found.bad.append(f"{place}: can't be undone: {raised!r}")
        _check(found, work, {before[0]: before[1]}, f"{place}, undone")
    found.undone = found.tried - found.kept
    return found


def _interrupted(act: Callable[[], object], number: int) -> str | None:
    """What is wrong with how ``act`` ended, interrupted at event ``number``; None where SIGINT came out of it."""
    count = -1

    def interrupt(place: Place) -> None:
        nonlocal count
        count += 1
        if count == number:
            signal.raise_signal(signal.SIGINT)

    try:
        _traced(act, interrupt)
    except KeyboardInterrupt:
        return None
    except BaseException as error:
        return "".join(traceback.format_exception(error)[-4:])
    return "the interrupt was lost" if count >= number else None


def _traced(act: Callable[[], object], on_line: Callable[[Place], object]) -> None:
    def local(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            on_line((frame.f_code.co_filename, frame.f_lineno))
        return local

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(SOURCE) else None

    before = sys.gettrace()
    try:
        sys.settrace(trace)
        act()
    finally:
        sys.settrace(before)


def _known(work: Work) -> tuple[Hashable, dict[str, Any]]:
    return work.label(), state_of(work.model)


def _check(found: Swept, work: Work, wanted: dict[Hashable, dict[str, Any]], place: str) -> None:
    label, state = _known(work)
    if label not in wanted:
        found.bad.append(f"{place}: recorded is {label!r}, not one of {list(wanted)!r}")
        return
    differing = [name for name, value in wanted[label].items() if not _same(state.get(name), value)]
    differing += sorted(state.keys() - wanted[label].keys())
    if differing:
        found.bad.append(f"{place}: with {label!r} recorded, other than expected: {', '.join(differing[:4])}")
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        found.bad.append(f"{place}: SIGINT is handled by {signal.getsignal(signal.SIGINT)!r}")
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def state_of(model: nn.Module) -> dict[str, Any]:
    """By name: tensors, flags, modes, hooks, replaced methods, and what else modules say of themselves."""
    state: dict[str, Any] = {}
    for name, tensor in _tensors(model):
        state[name] = tensor.detach().clone()
        state[f"{name} requires_grad"] = (tensor.requires_grad, tensor.grad is None)
    for name, module in model.named_modules():
        state[f"{name} training"] = (type(module).__name__, module.training)
        hooks = [len(value) for key, value in vars(module).items() if "hook" in key and isinstance(value, dict)]
        methods = sorted(key for key, value in vars(module).items() if callable(value) and key != "act_fn")
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, str)) and k != "training"}
        state[f"{name} hooks"] = (hooks, methods)
        state[f"{name} attributes"] = plain
    return state


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
