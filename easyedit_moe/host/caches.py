"""EasyEdit's module-level caches: each run of a method gets its own, and the user's come back afterwards."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from easyedit_moe.host.importing import HOST

INITIAL: dict[str, Any] = {
    "CONTEXT_TEMPLATES_CACHE": None,
    "COV_CACHE": {},
    "inv_mom2_cache": {},
    "P_loaded": False,
    "cache_c_new": False,
    "edit_history": [],
    "merge_group_edit_history": [],
}
"""Caches by name, in whichever of EasyEdit's modules they occur, as they are after import."""
UNSET = ("P", "cache_c")
"""Globals of modules with ``P_loaded`` or ``cache_c_new`` that exist only once something was cached."""


class HostCaches:
    """The caches of one run of one method on one model, kept between its batches."""

    def __init__(self) -> None:
        self._state: dict[str, dict[str, Any]] | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within, EasyEdit sees these caches; afterwards those that were there before, untouched."""
        before = _read()
        _write(_fresh(before) if self._state is None else self._state)
        try:
            yield
        finally:
            self._state = _read()
            _write(before)


def _modules() -> dict[str, Any]:
    prefix = f"{HOST}.models."
    return {
        name: module
        for name, module in list(sys.modules.items())
        if name.startswith(prefix) and any(cache in vars(module) for cache in INITIAL)
    }


def _names(module: Any) -> list[str]:
    names = [name for name in INITIAL if name in vars(module)]
    return [*names, *UNSET] if {"P_loaded", "cache_c_new"} & set(names) else names


def _read() -> dict[str, dict[str, Any]]:
    return {
        where: {name: vars(module)[name] for name in _names(module) if name in vars(module)}
        for where, module in _modules().items()
    }


def _fresh(state: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        where: {name: copy.copy(INITIAL[name]) for name in values if name in INITIAL} for where, values in state.items()
    }


def _write(state: dict[str, dict[str, Any]]) -> None:
    for where, module in _modules().items():
        for name in _names(module):
            if name in state.get(where, {}):
                setattr(module, name, state[where][name])
            elif name in UNSET:
                vars(module).pop(name, None)
