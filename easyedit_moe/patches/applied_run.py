"""Patches that follow each other on one model while it is worked on: one set of originals, and one way back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from easyedit_moe.interrupts import do_all, uninterrupted
from easyedit_moe.moe.holding import Hold, held
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches.runs import continues, continues_tensors
from easyedit_moe.patches.tensors import TensorPatch, restore_tensors
from easyedit_moe.patches.weights import WeightPatch, restore


class Restorable(Protocol):
    """A patch of any kind that lies on a model."""

    def restore(self, model: nn.Module) -> Any:
        """Put back what was there before, whatever happened since."""


class _FirstOriginals:
    """What a patch of whole tensors overwrote that no earlier one of its run had: all that leads back to before it.

    The patch itself is not held: its values are as large, and only who made it knows whether they are needed.
    """

    def __init__(self, patch: TensorPatch, known: Mapping[str, Tensor]) -> None:
        self.originals = {name: original for name, original in patch.originals.items() if name not in known}
        self._patch = weakref.ref(patch)

    @property
    def patch(self) -> TensorPatch | None:
        """The patch, where somebody holds it."""
        return self._patch()

    def restore(self, model: nn.Module) -> None:
        """Put the originals back; nothing the second time."""
        with held(model), uninterrupted():
            restore_tensors(model, self.originals)
            self.originals, patch = {}, self.patch
            if patch is not None:
                patch.forget()


class AppliedRun:
    """The patches of batches that are edited one after the other inside an `intact` scope.

    The scope of each write registers with the hold how to undo it, with all that was overwritten: batch by batch one
    more copy of the edited experts. A run takes the place of those entries, so that one copy is held however many
    batches there are.

    Attributes:
        patches: those that were added, oldest first; of patches of whole tensors what they overwrote first.
    """

    def __init__(self, model: nn.Module, hold: Hold) -> None:
        self.patches: list[Restorable] = []
        self._tensors: dict[str, Tensor] = {}
        self._model, self._undo = model, hold.undo
        self._undo.append(self.restore)
        self._mark = len(self._undo)

    def add(self, patch: Restorable) -> None:
        """Take over a patch that was just written, and not changed since."""
        last = self.patches[-1] if self.patches else None
        if isinstance(patch, TensorPatch):
            self._add_tensors(patch)
        else:
            self.patches.append(patch)
        if isinstance(patch, WeightPatch):
            continues(patch, last if isinstance(last, WeightPatch) else None)
        if isinstance(patch, (TensorPatch, WeightPatch)):
            # Last, so that an interrupt before finds the scope's own entry.
            del self._undo[self._mark :]

    def _add_tensors(self, patch: TensorPatch) -> None:
        parts = [part.patch for part in self.patches if isinstance(part, _FirstOriginals)]
        continues_tensors(patch, [part for part in parts if part is not None])
        first = _FirstOriginals(patch, self._tensors)
        self._tensors.update(first.originals)
        self.patches.append(first)

    def restore(self) -> None:
        """Put back what was there before the first; nothing is computed, and the second time nothing happens."""
        do_all(self._put_back(patch) for patch in reversed(self.patches))
        self._tensors = {}

    def _put_back(self, patch: Restorable) -> Callable[[], Any]:
        if not isinstance(patch, WeightPatch):
            return partial(patch.restore, self._model)

        def copied() -> None:
            # Newest first: a matrix ends as the oldest patch that holds an original of it found it.
            restore(MoELayerView(self._model, site=patch.site), patch.originals)
            patch.forget()

        return copied
