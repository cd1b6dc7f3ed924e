"""The one registry of editors."""

from __future__ import annotations

from easyedit_moe.editors.base import Editor
from easyedit_moe.errors import MethodError
from easyedit_moe.hparams import MoEHyperParams, presets

_EDITORS: dict[str, type[Editor]] = {}


def register_editor(cls: type[Editor]) -> type[Editor]:
    """Class decorator that makes an editor known by its ``method``.

    Raises:
        MethodError: the name is taken, or has no entry in :mod:`easyedit_moe.hparams.presets`.
    """
    if cls.method in _EDITORS:
        raise MethodError(f"The method {cls.method!r} is already registered, by {_EDITORS[cls.method].__name__}.")
    presets.canonical_name(cls.method)
    _EDITORS[cls.method] = cls
    return cls


def editor_class(name: str) -> type[Editor]:
    """The editor of a method or alias.

    Raises:
        MethodError: unknown; the message names the nearest method.
    """
    return _EDITORS[presets.canonical_name(name)]


def make_editor(hparams: MoEHyperParams, progress: bool = True) -> Editor:
    """The editor that ``hparams.alg_name`` asks for."""
    return editor_class(hparams.alg_name)(hparams, progress=progress)


def method_names() -> list[str]:
    """All registered methods."""
    return list(_EDITORS)
