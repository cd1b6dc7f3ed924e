"""Patches that follow each other on one model while it is worked on: one set of originals, and one way back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from torch import nn

from easyedit_moe.interrupts import do_all
from easyedit_moe.moe.holding import Hold
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches.runs import continues
from easyedit_moe.patches.weights import WeightPatch, restore


class Restorable(Protocol):
    """A patch of any kind that lies on a model."""

    def restore(self, model: nn.Module) -> Any:
        """Put back what was there before, whatever happened since."""


class AppliedRun:
    """The patches of batches that are edited one after the other inside an `intact` scope.

    The scope of each write registers with the hold how to undo it, with all that was overwritten: batch by batch one
    more copy of the edited experts. A run takes the place of those entries, so that one copy is held however many
    batches there are.

    Attributes:
        patches: those that were added, oldest first.
    """

    def __init__(self, model: nn.Module, hold: Hold) -> None:
        self.patches: list[Restorable] = []
        self._model, self._undo = model, hold.undo
        self._undo.append(self.restore)
        self._mark = len(self._undo)

    def add(self, patch: Restorable) -> None:
        """Take over a patch that was just written, and not changed since."""
        last = self.patches[-1] if self.patches else None
        self.patches.append(patch)
        if isinstance(patch, WeightPatch):
            continues(patch, last if isinstance(last, WeightPatch) else None)
            # Last, so that an interrupt before finds the scope's own entry.
            del self._undo[self._mark :]

    def restore(self) -> None:
        """Put back what was there before the first; nothing is computed, and the second time nothing happens."""
        do_all(self._put_back(patch) for patch in reversed(self.patches))

    def _put_back(self, patch: Restorable) -> Callable[[], Any]:
        if not isinstance(patch, WeightPatch):
            return partial(patch.restore, self._model)

        def copied() -> None:
            # Newest first: a matrix ends as the oldest patch that holds an original of it found it.
            restore(MoELayerView(self._model, site=patch.site), patch.originals)
            patch.forget()

        return copied
