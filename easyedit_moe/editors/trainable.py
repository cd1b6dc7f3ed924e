"""Which parameters are trained, whether they can be, and the scope in which they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from easyedit_moe.errors import LayoutError
from easyedit_moe.moe.capture import frozen_parameters, inference_mode_of
from easyedit_moe.moe.layers import MoELayer


@contextmanager
def trainable(model: nn.Module, parameters: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Evaluation mode, gradients for ``parameters`` only; afterwards modes and ``requires_grad`` flags are as before.

    Gradients are asked for by name and never stored, so that no ``.grad`` of the user's is touched.
    """
    with inference_mode_of(model), frozen_parameters(model), torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Torch's global generators are seeded inside, and afterwards in the state in which they were."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def expert_parameters(moe: MoELayer, part: str) -> dict[str, nn.Parameter]:
    """Parameters of a layer's routed experts by full name: ``down_projections``, or ``experts`` for all of them."""
    if part == "down_projections":
        return {f"{moe.experts_name}.{name}": parameter for name, parameter in moe.experts.parameters()}
    return {f"{moe.experts_name}.{name}": parameter for name, parameter in moe.experts.module.named_parameters()}


def check_writable(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise `LayoutError` for parameters that can't be trained: offloaded, or not of a float dtype."""
    for name, parameter in parameters.items():
        if parameter.is_meta or not parameter.is_floating_point() or type(parameter.data) is not Tensor:
            where = "offloaded" if parameter.is_meta else f"a {type(parameter.data).__name__} of {parameter.dtype}"
            raise LayoutError(f"{name} is {where}; training needs float weights on a GPU or on the CPU.")
