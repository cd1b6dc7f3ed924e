"""Registers our editors as soon as EasyEdit has been imported, before or after this package."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

HOST = "easyeditor"


def watch() -> None:
    """Register now if EasyEdit is there, else when it comes; light, and safe to call again."""
    host = sys.modules.get(HOST)
    if host is None:
        if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Watcher())
    elif not getattr(host.__spec__, "_initializing", False):
        _register_or_warn()


def _register_or_warn() -> None:
    """A host that can't take our editors is warned about, since the import that led here must not fail for it.

    ``easyedit_moe.register()`` raises the same error.
    """
    from easyedit_moe.errors import EditingError, EditingWarning
    from easyedit_moe.host.registration import register

    try:
        register()
    except EditingError as error:
        warnings.warn(f"The editors of easyedit_moe were not registered: {error}", EditingWarning, stacklevel=2)


class _Watcher(MetaPathFinder):
    """Finds EasyEdit as Python would (or in ``EASYEDIT_HOME``) and lets the registration follow its import.

    An ``EASYEDIT_HOME`` without it raises HostError, which is an ImportError, instead of finding another one.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != HOST:
            return None
        folder = None
        if os.environ.get("EASYEDIT_HOME"):
            from easyedit_moe.host.importing import home

            folder = home()
        spec = PathFinder.find_spec(fullname, path if folder is None else [str(folder)])
        if spec is None or spec.loader is None:
            return None
        spec.loader = _RegisteringLoader(spec.loader, self, text_only=folder is not None)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, loader: Any, watcher: _Watcher, text_only: bool) -> None:
        self._loader, self._watcher, self._text_only = loader, watcher, text_only

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        if self._text_only:
            from easyedit_moe.host.importing import import_with_placeholders

            import_with_placeholders(lambda: self._loader.exec_module(module))
        else:
            self._loader.exec_module(module)
        if self._watcher in sys.meta_path:
            sys.meta_path.remove(self._watcher)
        _register_or_warn()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
