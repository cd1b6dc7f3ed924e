from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import FAMILIES, tiny_model
from torch import nn

from benchmarks.syncs import counted_syncs
from easyedit_moe.moe.fingerprint import down_checksums, model_fingerprint, weights_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.storage.checksums import checksum


@pytest.mark.parametrize("family", FAMILIES)
def test_one_bit_of_one_down_projection_shows(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    view = MoELayerView(model)
    layer = max(view.layers)
    before, edited_out = weights_fingerprint(view), model_fingerprint(view)
    weight = view.layers[layer].experts.read(5)
    with torch.no_grad():
        kept = weight[3, 7].clone()
        weight[3, 7] = -kept
        assert weights_fingerprint(view) != before
        assert model_fingerprint(view) == edited_out
        weight[3, 7] = kept
    assert weights_fingerprint(view) == before


def test_swapped_experts_and_layers_show() -> None:
    view = MoELayerView(tiny_model())
    before = weights_fingerprint(view)
    first, second = view.layers[1].experts.read(0), view.layers[1].experts.read(1)
    with torch.no_grad():
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)
    assert weights_fingerprint(view) != before


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist"])
def test_checksums_are_of_canonical_matrices(family: str) -> None:
    view = MoELayerView(tiny_model(family))
    found = down_checksums(view)
    assert sorted(found) == sorted(view.layers)
    for layer, experts in found.items():
        for expert, value in experts.items():
            assert value == checksum(view.layers[layer].experts.read(expert).contiguous())


def test_layers_on_the_meta_device_are_left_out() -> None:
    model = tiny_model()
    model.model.layers[3].to("meta")
    view = MoELayerView(model)
    assert sorted(down_checksums(view)) == [0, 1, 2]
    assert len(weights_fingerprint(view)) == 64


def router(model: nn.Module) -> nn.Parameter:
    return next(p for name, p in model.named_parameters() if name.endswith("mlp.gate.weight"))


def replaced(model: nn.Module) -> None:
    norm = model.model.norm
    shape = norm.weight.shape
    del norm.weight
    norm.weight = nn.Parameter(torch.full(shape, 2.0))


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda model: router(model).detach()[2, 3:].mul_(-1),
    "loaded": lambda model: model.load_state_dict({"model.norm.weight": model.model.norm.weight + 1}, strict=False),
    "through .data": lambda model: router(model).data.mul_(-1),
    "another tensor as .data": lambda model: setattr(router(model), "data", router(model) * -1),
    "another parameter": replaced,
    "another dtype": lambda model: model.to(torch.bfloat16),
    "a parameter more": lambda model: model.register_parameter("more", nn.Parameter(torch.ones(2))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_is_seen(change: str) -> None:
    view = MoELayerView(tiny_model())
    before = model_fingerprint(view)
    assert model_fingerprint(view) == before
    with torch.no_grad():
        CHANGES[change](view.model)
    assert model_fingerprint(view) != before


def test_a_device_is_read_once() -> None:
    view = MoELayerView(tiny_model())
    with counted_syncs("cpu") as found:
        model_fingerprint(view)
    assert sum(found.values()) <= 3


def test_a_model_made_in_inference_mode_is_hashed_each_time() -> None:
    with torch.inference_mode():
        view = MoELayerView(tiny_model())
        before = model_fingerprint(view)
        router(view.model).mul_(-1)
        assert model_fingerprint(view) != before
