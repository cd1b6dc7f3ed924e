"""A model held by one thread while it is worked on, and left as it was if that fails, wherever it fails.

Scopes put back what they change when they are left. An interrupt may come between the end of a scope's body and its
restoring, or within it, so what is around the whole work keeps its own record, too, and goes by that.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from easyedit_moe.interrupts import do_all
from easyedit_moe.moe.model_state import ModelState
from easyedit_moe.moe.wrappers import plain_model

_WAIT = 0.002
"""Seconds between two looks at whether another thread has let go of a model."""


class Hold:
    """Who works on a model, and how what was done since is undone.

    Attributes:
        undo: called, newest first, if the work fails; each must do no harm when called twice.
        guarded: `intact` is under way.
    """

    def __init__(self) -> None:
        self.undo: list[Callable[[], object]] = []
        self.guarded = False
        self._owner: dict[str, threading.Thread] = {}

    @property
    def mine(self) -> bool:
        """Whether the calling thread holds the model."""
        return self._owner.get("thread") is threading.current_thread()

    def take(self) -> None:
        """Wait until no other thread holds the model, and hold it."""
        me = threading.current_thread()
        # Each look is one operation of a dict, which neither threads nor interrupts divide.
        while (owner := self._owner.setdefault("thread", me)) is not me:
            if not owner.is_alive():
                self._owner.pop("thread", None)
            time.sleep(_WAIT)

    def let_go(self) -> None:
        """Leave the model to others; nothing the second time."""
        if self.mine:
            self._owner.pop("thread", None)

    def close(self) -> None:
        """The work is done or undone."""
        self.guarded = False
        self.undo.clear()


_HOLDS: weakref.WeakKeyDictionary[nn.Module, Hold] = weakref.WeakKeyDictionary()


@contextmanager
def held(model: nn.Module) -> Iterator[Hold]:
    """Inside, the model is this thread's: others that want to edit, score or capture it wait.

    Scopes of one thread may lie within each other. A wrapper of PEFT or ``torch.compile`` counts as the model in it.
    """
    hold = _HOLDS.setdefault(plain_model(model), Hold())
    if hold.mine:
        yield hold
        return
    try:
        try:
            hold.take()
            yield hold
        finally:
            hold.let_go()
    finally:
        hold.let_go()  # an interrupt may have come before the other


@contextmanager
def intact(model: nn.Module, kept: Callable[[], bool] | None = None) -> Iterator[Hold]:
    """If anything raises inside, the model is afterwards as before: what ``undo`` knows of, hooks, modes, flags.

    What is registered in a scope within another is undone by that one, too, should it fail later.

    Args:
        model: is `held` inside.
        kept: says, once something was raised, whether the work was done by then, so that nothing is undone; what it
            looks at is to change by one assignment. By default it never is.
    """
    with held(model) as hold:
        outermost, mark = not hold.guarded, len(hold.undo)
        state = ModelState.of(model) if outermost else None
        try:
            try:
                hold.guarded = True
                yield hold
            except BaseException:
                if kept is None or not kept():
                    last = [] if state is None else [state.put_back]
                    do_all([*reversed(hold.undo[mark:]), *last])
                    del hold.undo[mark:]
                raise
            finally:
                if outermost:
                    hold.close()
        finally:
            if outermost:
                hold.close()
