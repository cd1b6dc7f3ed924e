"""What can be iterated over: a type that says so may still refuse, as an array without dimensions does."""

from __future__ import annotations

from typing import Any


def is_iterable(value: Any) -> bool:
    """Whether ``iter(value)`` is possible; of an iterator nothing is taken."""
    try:
        iter(value)
    except TypeError:
        return False
    return True
