"""A change wanted at a layer's output, as the change of the experts' sum that brings it about."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import Behind, assert_same_state, shared_model, state_of, tiny_model, token_ids
from torch import Tensor, nn

from easyedit_moe.moe.capture import capture_facts, hooks, inference_mode_of
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.tails import FactPlaces, IdentityTail, LocalTail, ScaleTail, pulled_back

SEQUENCES, POSITIONS = [token_ids(6, seed) for seed in range(3)] + [token_ids(9, 7)], [5, 0, 3, 6]


def outputs(view: MoELayerView, index: int, shift: Tensor | None = None) -> Tensor:
    """Outputs ``[T, D]`` of a layer at the fact tokens, one plain forward each."""
    rows = []
    moe = view.layers[index]
    for i, (ids, at) in enumerate(zip(SEQUENCES, POSITIONS, strict=True)):

        def add(module: nn.Module, args: tuple, output: Any, i: int = i, at: int = at) -> Any:
            return moe.experts.shifted_sum(output, torch.tensor([at]), shift[i : i + 1])

        with inference_mode_of(view.model), hooks() as handles:
            if shift is not None:
                handles.append(moe.sum_site.register_forward_hook(add))
            rows.append(capture_facts(view, [ids], [at], [], [index], 0).outputs[index])
    return torch.cat(rows)


def normed(family: str, behind: nn.Module) -> MoELayerView:
    model = tiny_model(family)
    for layer in model.model.layers:
        layer.mlp = Behind(layer.mlp, behind)
    return MoELayerView(model)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist", "deepseek_v3"])
@pytest.mark.parametrize("behind", [nn.Linear(32, 32), nn.Sequential(nn.Linear(32, 32), nn.Tanh()), nn.RMSNorm(32)])
def test_what_is_reached_is_what_a_forward_shows(family: str, behind: nn.Module) -> None:
    torch.manual_seed(0)
    for module in behind.modules():
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight)
    view = normed(family, behind)
    places = FactPlaces(view, SEQUENCES, POSITIONS, 0, batch_size=3)
    before = outputs(view, 2)
    wanted = 0.2 * torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
    state = state_of(view.model)
    found = pulled_back(2, wanted, places)
    assert_same_state(state, state_of(view.model))
    torch.testing.assert_close(outputs(view, 2, found.shift) - before, found.reached, atol=1e-5, rtol=1e-4)
    left = (found.reached - wanted).norm(dim=1) / wanted.norm(dim=1)
    # A norm keeps the length: one direction of 32 is out of reach.
    assert (left < (0.7 if isinstance(behind, nn.RMSNorm) else 1e-3)).all(), left
    assert torch.equal(LocalTail().pull_back(2, wanted, 0.5, places), found.shift * 0.5)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_plain_sum_pulled_back_by_its_jacobian_is_the_identity(family: str) -> None:
    view = MoELayerView(shared_model(family))
    places = FactPlaces(view, SEQUENCES, POSITIONS, 0)
    wanted = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(pulled_back(2, wanted, places).shift, wanted, atol=1e-4, rtol=1e-4)


def test_plain_tails_cost_no_forward_and_no_rounding() -> None:
    nowhere: Any = None
    wanted = torch.randn(5, 32)
    for weight in (1.0, 0.5, 3**-0.5):
        assert torch.equal(IdentityTail().pull_back(0, wanted, weight, nowhere), wanted * (weight / 1.0))
        assert torch.equal(ScaleTail(0.22).pull_back(0, wanted, weight, nowhere), wanted * (weight / 0.22))
