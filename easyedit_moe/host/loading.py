"""Importing EasyEdit with our editors registered in it."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from types import ModuleType

from easyedit_moe.errors import HostError
from easyedit_moe.host.importing import GET_IT, HOST, _on_path, _process_state, home, import_with_placeholders


def load() -> ModuleType:
    """Import EasyEdit and register our editors in it; from ``EASYEDIT_HOME`` if set, else from the path.

    Packages that text editing never uses (`easyedit_moe.host.placeholders.OPTIONAL`) may be absent: EasyEdit
    then gets placeholders for them, named in one log line, which raise when used. The random state, the
    root logger and environment variables, which importing EasyEdit changes, are put back; the editors' own logger
    keeps the level INFO.

    Raises:
        HostError: EasyEdit is not there, lacks a package that text editing needs, or is too old or too new (the
            missing symbol is named).
        MethodError: EasyEdit has a method of its own by one of our names.
    """
    from easyedit_moe.host.registration import register

    if HOST not in sys.modules:
        folder = home()
        if folder is None and importlib.util.find_spec(HOST) is None:
            raise HostError(f"EasyEdit is not installed: there is no '{HOST}' on the path. {GET_IT}")
        with _on_path(folder), _process_state():
            import_with_placeholders(lambda: importlib.import_module(HOST))
        logging.getLogger(f"{HOST}.editors.editor").setLevel(logging.INFO)
    register()
    return sys.modules[HOST]
