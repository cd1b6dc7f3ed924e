"""Putting our editors into EasyEdit: its table of methods, its list of batchable ones, and its BaseEditor."""

from __future__ import annotations

import functools
import types
from typing import Any

from easyedit_moe.editors import editor_class, method_names
from easyedit_moe.errors import HyperParamsError, MethodError
from easyedit_moe.host.importing import check_symbols
from easyedit_moe.hparams import MoEHyperParams, hyperparams_class, presets

_MARK = "_easyedit_moe"
_JOINED = "_easyedit_moe_joined"


def register() -> list[str]:
    """Make every editor of ours a method of the imported EasyEdit; safe to call again.

    ``ALG_DICT`` gets their ``apply_to_model``, ``BatchEditor.is_batchable_method`` knows them, and
    ``BaseEditor.from_hparams`` (or ``BaseEditor(hparams)``) makes a `easyedit_moe.host.editor.HostEditor` for
    our hparams; subclasses of ``BaseEditor`` do so, too, and keep what they override. For all other hparams EasyEdit is
    as before. Runs by itself once both packages have been imported.

    Returns:
        The names that were registered, aliases included.

    Raises:
        HostError: EasyEdit is not imported, or lacks a symbol that is needed.
        MethodError: EasyEdit has a method of its own by one of these names. Nothing is registered then.
    """
    host = check_symbols()
    table = host["ALG_DICT"]
    ours = {name: editor_class(name).apply_to_model for name in [*method_names(), *presets.ALIASES]}
    for name, function in ours.items():
        if name in table and getattr(table[name], "__func__", None) is not getattr(function, "__func__", None):
            raise MethodError(
                f"EasyEdit and easyedit_moe both claim the method name {name!r}; EasyEdit's is "
                f"{getattr(table[name], '__module__', '?')}. Remove one of them from ALG_DICT before registering."
            )
    table.update(ours)
    host["CALLABLE_RESTORE_ALGS"].update(name for name in ours if presets.find_method(name).edits == "adapter")
    _make_batchable(frozenset(ours))
    _make_editors(host["BaseEditor"], frozenset(ours))
    return list(ours)


def _make_batchable(names: frozenset[str]) -> None:
    from easyeditor.editors.batch_editor import BatchEditor

    known = BatchEditor.is_batchable_method
    original = getattr(known, _MARK, known)

    def is_batchable_method(alg_name: str) -> bool:
        return alg_name in names or original(alg_name)

    setattr(is_batchable_method, _MARK, original)
    BatchEditor.is_batchable_method = staticmethod(is_batchable_method)


def _make_editors(base: Any, names: frozenset[str]) -> None:
    if _MARK in vars(base):
        return

    original = base.__init__

    def new(cls: type, hparams: Any = None, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, MoEHyperParams) for value in (hparams, *args, *kwargs.values())):
            return object.__new__(_with_our_calls(cls, base))
        name = getattr(hparams, "alg_name", None)
        if name in names:
            raise HyperParamsError(
                f"{name} is a method of easyedit_moe and needs {hyperparams_class(name).__name__}; found "
                f"{type(hparams).__name__}."
            )
        return object.__new__(cls)

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        """Reached on one of ours only where a subclass names BaseEditor instead of super()."""
        from easyedit_moe.editor import EditCalls

        if not isinstance(self, EditCalls):
            return original(self, *args, **kwargs)
        from easyedit_moe.host.editor import HostEditor

        ours: Any = HostEditor
        return ours.__init__(self, *args, **kwargs)

    base.__new__, base.__init__ = new, init
    setattr(base, _MARK, True)


def _with_our_calls(cls: type, base: type) -> type:
    """The class of an editor with our hparams: HostEditor, or for a subclass of BaseEditor one of both.

    In the latter ``super()`` of the subclass leads to HostEditor, and what the subclass overrides counts.
    """
    from easyedit_moe.host.editor import HostEditor

    if cls is base or issubclass(cls, HostEditor):
        return HostEditor if cls is base else cls
    if _JOINED not in vars(cls):
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        setattr(
            cls, _JOINED, types.new_class(cls.__name__, (cls, HostEditor), exec_body=lambda body: body.update(names))
        )
    found: type = vars(cls)[_JOINED]
    return found
