"""What a model is besides the values of its tensors: submodules, hooks, forwards, modes, flags, gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from easyedit_moe.interrupts import do_all


@dataclass(frozen=True)
class _ModuleState:
    """Of one module the class, its attributes, and the content of those that are dicts (submodules, hooks)."""

    module: nn.Module
    kind: type
    attributes: dict[str, Any]
    contents: list[tuple[dict[Any, Any], dict[Any, Any]]]

    @staticmethod
    def of(module: nn.Module) -> _ModuleState:
        attributes = dict(vars(module))
        contents = [(value, value.copy()) for value in attributes.values() if isinstance(value, dict)]
        return _ModuleState(module, type(module), attributes, contents)

    def put_back(self) -> None:
        if type(self.module) is not self.kind:
            self.module.__class__ = self.kind
        for value, content in self.contents:  # in place, since the handle of a hook knows its dict
            value.clear()
            value.update(content)
        vars(self.module).clear()
        vars(self.module).update(self.attributes)


@dataclass(frozen=True)
class ModelState:
    """A model's structure and flags at one time; the values of tensors are not part of it."""

    modules: list[_ModuleState]
    parameters: list[tuple[nn.Parameter, bool, Tensor | None]]

    @staticmethod
    def of(model: nn.Module) -> ModelState:
        """As it is now: a few microseconds per module."""
        modules = [_ModuleState.of(module) for module in model.modules()]
        return ModelState(modules, [(p, p.requires_grad, p.grad) for p in model.parameters()])

    def put_back(self) -> None:
        """All of it as it was."""
        do_all([*(state.put_back for state in self.modules), *self._flags()])

    def put_back_modules(self) -> None:
        """Modules as they were; flags and gradients of parameters stay."""
        do_all(state.put_back for state in self.modules)

    def put_back_flags(self) -> None:
        """``requires_grad`` and ``grad`` of every parameter as they were."""
        do_all(self._flags())

    def _flags(self) -> list[Callable[[], None]]:
        return [partial(_put_back_flags, *row) for row in self.parameters]


def _put_back_flags(parameter: nn.Parameter, flag: bool, grad: Tensor | None) -> None:
    parameter.requires_grad_(flag)
    parameter.grad = grad
