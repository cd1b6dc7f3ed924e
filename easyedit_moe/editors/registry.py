"""Editors by the name of their method, from the table of methods; an editor's file is imported when it is needed."""

from __future__ import annotations

from typing import Any

from easyedit_moe.editors.base import Editor
from easyedit_moe.errors import HyperParamsError, shown
from easyedit_moe.hparams import presets


def editor_class(name: str) -> type[Editor]:
    """The editor of a method or alias, ours or the one that runs EasyEdit's own method.

    Raises:
        MethodError: unknown; the message names the nearest method.
    """
    found: type[Editor] = presets.located(presets.find_method(name).editor)
    return found


def make_editor(hparams: Any, progress: bool = True) -> Editor:
    """The editor that ``hparams.alg_name`` asks for.

    Raises:
        MethodError: unknown method. HyperParamsError: hyper-parameters of another method, or something else.
        HostError: one of EasyEdit's own methods, and EasyEdit is not there.
    """
    name = getattr(hparams, "alg_name", None)
    if not isinstance(name, str):
        raise HyperParamsError(
            f"An editor needs hyper-parameters of a method; found {shown(hparams)} ({type(hparams).__name__}). Read "
            "them by load_hyperparams, or make the method's class from a dict by its from_dict."
        )
    return editor_class(name)(hparams, progress=progress)


def method_names() -> list[str]:
    """All methods of ours, in the order of the papers' tables."""
    return [method.name for method in presets.own_methods()]
