"""EasyEdit as the host: import it, register our editors in it, run its editors beside ours.

Importing this package is light and does not import EasyEdit.
"""

from __future__ import annotations

import importlib
from typing import Any

_LOCATIONS = {
    "load": "loading",
    "is_available": "importing",
    "register": "registration",
}

__all__ = list(_LOCATIONS)


def __getattr__(name: str) -> Any:
    if name not in _LOCATIONS:
        raise AttributeError(f"module 'easyedit_moe.host' has no attribute {name!r}")
    return getattr(importlib.import_module(f"easyedit_moe.host.{_LOCATIONS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
