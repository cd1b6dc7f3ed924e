"""Random patches of both kinds, written into small models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from easyedit_moe.algebra.routed_keys import FactoredUpdate
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches.tensors import TensorPatch, writing_tensors
from easyedit_moe.patches.weights import WeightPatch, writing

EXPERTS = (0, 3, 6)


def update_for(
    view: MoELayerView, layer: int, scale: float = 0.02, experts: Sequence[int] = EXPERTS, seed: int = 0
) -> FactoredUpdate:
    """A random update of rank 1, 2, ... per expert, in float64 as solvers give it."""
    layout = view.layers[layer].experts.layout
    draw = torch.Generator().manual_seed(100 * seed + layer)
    left = torch.randn(layout.d_model, 6, generator=draw, dtype=torch.float64) * scale
    columns = tuple(torch.randperm(6, generator=draw)[: i + 1] for i in range(len(experts)))
    right = tuple(torch.randn(layout.d_hidden, len(c), generator=draw, dtype=torch.float64) for c in columns)
    return FactoredUpdate(left, tuple(experts), columns, right)


def write(model: nn.Module, layers: Sequence[int] = (1, 2), seed: int = 0, **options: Any) -> WeightPatch:
    view = MoELayerView(model)
    with writing(view) as writer:
        for layer in layers:
            writer.write(layer, update_for(view, layer, seed=seed, **options))
        return writer.finish({"note": "test"}, model_fingerprint(view))


def some_names(model: nn.Module) -> list[str]:
    """One parameter of each kind in layers 1 and 2: experts, router, attention, norm."""
    by_kind: dict[tuple[str, ...], str] = {}
    for name, _ in model.named_parameters():
        if ".layers.1." in name or ".layers.2." in name:
            by_kind.setdefault(tuple(p for p in name.split(".") if not p.isdigit()), name)
    return list(by_kind.values())


def new_values(model: nn.Module, seed: int = 0, names: list[str] | None = None) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    out = {}
    for name in names or some_names(model):
        value = model.get_parameter(name).detach().float()
        out[name] = value + 0.01 * torch.randn(value.shape, generator=draw)
    return out


def write_tensors(model: nn.Module, values: Mapping[str, Tensor]) -> TensorPatch:
    with writing_tensors(model) as writer:
        for name, value in values.items():
            writer.write(name, value)
        return writer.finish({"note": "test"})
