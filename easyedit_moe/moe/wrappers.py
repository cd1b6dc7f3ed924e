"""Adapters and wrappers around a model: the names and parameters that are the model's own."""

from __future__ import annotations

from typing import Any

from torch import nn

_WRAPPERS = ("base_layer", "_orig_mod")
_PEFT = "base_model.model."


def plain_name(name: str) -> str:
    """A parameter's or module's name as it is without PEFT's and ``torch.compile``'s wrappers around its modules."""
    parts = name.removeprefix("_orig_mod.").removeprefix(_PEFT).split(".")
    return ".".join(part for part in parts if part not in _WRAPPERS)


def plain_model(model: nn.Module) -> nn.Module:
    """The model inside PEFT's and ``torch.compile``'s wrappers; itself where there are none."""
    while True:
        inner: Any = getattr(model, "_orig_mod", None)
        if inner is None and hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            of_peft: Any = model
            inner = of_peft.get_base_model()
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters by plain name, without those of adapters; a shared one under each of its names."""
    foreign = _adapter_parameters(model)
    found = model.named_parameters(remove_duplicate=False)
    return {plain_name(name): parameter for name, parameter in found if id(parameter) not in foreign}


def _adapter_parameters(model: nn.Module) -> set[int]:
    """Ids of what PEFT's layers, and modules that say ``is_adapter``, hold beside the model's own parameters."""
    found: set[int] = set()
    for module in model.modules():
        if getattr(module, "is_adapter", False):
            found |= {id(parameter) for parameter in module.parameters()}
        for name in getattr(module, "adapter_layer_names", ()):
            part = getattr(module, name, None)
            if isinstance(part, (nn.Module, nn.ParameterDict)):
                found |= {id(parameter) for parameter in part.parameters()}
    return found
