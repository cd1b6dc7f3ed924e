"""Ctrl-C at the wrong moment: put off while something short is made whole, and restoring that goes on to its end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class _Later:
    """A handler that remembers the signal for the one in whose place it stands."""

    def __init__(self, before: Callable[[int, FrameType | None], Any]) -> None:
        self.before = before
        self.came: tuple[int, FrameType | None] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came = (number, frame)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, SIGINT waits; it is handed to the handler that was there before as soon as the section is over.

    For sections that are short and must be whole. Sections within each other are one. Off the main thread, which alone
    gets signals, and where SIGINT is ignored or ends the process, nothing is changed.
    """
    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not main or not callable(before) or isinstance(before, (_Later, signal.Handlers)):
        yield
        return
    later = _Later(before)
    signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if later.came is not None:
            before(*later.came)


def do_all(steps: Iterable[Callable[[], object]]) -> None:
    """Every step, whatever one of them raises, and not interrupted; then the first of their errors is raised."""
    errors: list[BaseException] = []
    with uninterrupted():
        for step in steps:
            try:
                step()
            except BaseException as error:
                errors.append(error)
    if errors:
        raise errors[0]
