"""What ``save_pretrained`` of a model says while an adapter is attached: the checkpoint will be the base alone."""

from __future__ import annotations

import copy
import warnings
import weakref
from typing import Any

from torch import nn

from easyedit_moe.errors import EditingWarning

_NAME = "save_pretrained"


class BaseSaving:
    """Stands in for a model's ``save_pretrained``, warns, and calls it; a deep copy of the model has one of its own.

    Attributes:
        quiet: no warning, as the adapter is saved, too, or is no longer attached.
    """

    def __init__(self, model: nn.Module, before: Any) -> None:
        self._model = weakref.ref(model)
        self._before = before
        self.quiet = False

    @staticmethod
    def put_on(model: nn.Module) -> BaseSaving | None:
        """Put one on a model; None where the model has no ``save_pretrained``."""
        if not hasattr(type(model), _NAME):
            return None
        saving = BaseSaving(model, vars(model).get(_NAME))
        setattr(model, _NAME, saving)
        return saving

    def take_off(self, model: nn.Module) -> None:
        """Leave the model as before; where somebody wrapped this since, it stays below and only passes calls on."""
        self.quiet = True
        if vars(model).get(_NAME) is not self:
            return
        if self._before is None:
            delattr(model, _NAME)
        else:
            setattr(model, _NAME, self._before)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own ``save_pretrained``."""
        if not self.quiet:
            warnings.warn(
                "save_pretrained writes the base alone: the MEMoE adapter that is attached to the model is not in the "
                "checkpoint. easyedit_moe.adapters.saving.save_with_adapter(model, tok, folder) writes both.",
                EditingWarning,
                stacklevel=2,
            )
        if self._before is not None:
            return self._before(*args, **kwargs)
        model: Any = self._model()
        return type(model).save_pretrained(model, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> BaseSaving:
        """Of the copy of the model, where it is the model that is copied."""
        model: Any = self._model()
        copied = BaseSaving(memo.get(id(model), model), None)
        memo[id(self)] = copied
        copied._before, copied.quiet = copy.deepcopy(self._before, memo), self.quiet
        return copied
