"""``remember_edits`` in loops over ``apply_to_model``, whose interface passes nothing from one call to the next.

EasyEdit keeps such things in globals, which grow even where the weights are put back. Here a call is remembered with
checksums of the weights that it left: it counts for the next one as long as they are in the model.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from easyedit_moe.hparams import MoEHyperParams
from easyedit_moe.hparams.sites import EXPERTS
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches.weights import WeightPatch
from easyedit_moe.storage.checksums import checksums_of


@dataclass(frozen=True)
class _Call:
    """What one call left: its settings, its memory, and checksums of down-projections by layer and expert."""

    hparams: MoEHyperParams
    memory: Any
    left: dict[int, dict[int, int]]

    def lies_on(self, model: nn.Module) -> bool:
        view = MoELayerView(model, site=getattr(self.hparams, "site", EXPERTS))
        return all(
            checksums_of([view.layers[layer].experts.read(expert) for expert in experts]) == list(experts.values())
            for layer, experts in self.left.items()
        )


_CALLS: weakref.WeakKeyDictionary[nn.Module, list[_Call]] = weakref.WeakKeyDictionary()


def remembered(model: nn.Module, hparams: MoEHyperParams) -> Any:
    """The memory of the newest call with these settings that is still in the model; None where there is none.

    Calls are forgotten, newest first, until one is found whose weights lie on the model: the later ones were put back.
    """
    calls = _CALLS.get(model, [])
    while calls and not calls[-1].lies_on(model):
        calls.pop()
    for call in reversed(calls):
        if type(call.hparams) is type(hparams) and call.hparams == replace(hparams, batch_size=1):
            return call.memory
    return None


def remember(model: nn.Module, hparams: MoEHyperParams, memory: Any, patch: WeightPatch) -> None:
    """Keep what a call wants to be told next time; ``patch`` is what it wrote."""
    left = {layer: dict(experts) for layer, experts in patch.written.items()}
    _CALLS.setdefault(model, []).append(_Call(replace(hparams, batch_size=1), memory, left))


def remember_copy(model: nn.Module, copied: nn.Module) -> None:
    """A deep copy has the edits of the model it was made of."""
    if model in _CALLS and copied is not model:
        _CALLS[copied] = list(_CALLS[model])
