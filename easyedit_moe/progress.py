"""Progress bars: for stages longer than two seconds, on a terminal, where they are asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

DELAY = 2.0
"""Seconds that a stage must take before its bar appears."""


def progress_bar(total: int, name: str, unit: str, shown: bool = True, initial: int = 0) -> tqdm[Any]:
    """A bar on standard error that vanishes when its stage is over; a context manager, moved on by ``update``.

    Args:
        total: steps of the stage.
        name: of the stage, before the bar.
        unit: what one step is.
        shown: False for none at all; True shows it after `DELAY` seconds, and only on a terminal.
        initial: steps that were done before.
    """
    return tqdm(
        total=total, desc=name, unit=unit, initial=initial, delay=DELAY, leave=False, disable=None if shown else True
    )


@contextmanager
def library_bars(shown: bool = True) -> Iterator[None]:
    """Within, transformers shows bars of its own (of loading weights) only where `progress_bar` would, too."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    if before and not (shown and sys.stderr.isatty()):
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()
