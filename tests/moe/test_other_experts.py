"""Experts outside transformers' protocol: keys, sums, and what is refused."""

from __future__ import annotations

import pytest
import torch
from tiny import shared_model, tiny_model, token_ids
from torch import Tensor, nn

from easyedit_moe.errors import LayoutError
from easyedit_moe.moe.capture import hooks, inference_mode_of, read_routing
from easyedit_moe.moe.experts import find_experts
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.other_experts import CalledExperts, find_any_experts
from easyedit_moe.moe.probe import check_keys, measured_tail

IDS = token_ids(11)
E, D, H, SPARE = 5, 12, 8, 2


class Called(nn.Module):
    """Experts in transformers' way of calling, without its flags; those behind the last hand their input on."""

    def __init__(self, transposed: bool, spare: int = 0, d_model: int = D, d_hidden: int = H) -> None:
        super().__init__()
        down, up = (E, d_model, d_hidden), (E + spare, 2 * d_hidden, d_model)
        turn = (lambda s: (s[0], s[2], s[1])) if transposed else (lambda s: s)
        self.down_proj, self.gate_up_proj = nn.Parameter(torch.randn(turn(down))), nn.Parameter(torch.randn(turn(up)))
        self.transposed = transposed

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for slot in range(top_k_index.shape[1]):
            for token, j in enumerate(top_k_index[:, slot].tolist()):
                x = hidden_states[token]
                out[token] += top_k_weights[token, slot] * (x if j >= E else self.expert(x, j))
        return out

    def expert(self, x: Tensor, j: int) -> Tensor:
        up, down = self.gate_up_proj[j], self.down_proj[j]
        gate, linear = (x @ up if self.transposed else nn.functional.linear(x, up)).chunk(2, dim=-1)
        key = torch.tanh(gate).clamp(max=0.3) * linear
        return torch.matmul(key, down) if self.transposed else nn.functional.linear(key, down)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("spare", [0, SPARE])
def test_keys_are_what_the_module_multiplies_with_its_down_projection(transposed: bool, spare: int) -> None:
    torch.manual_seed(0)
    module = Called(transposed, spare)
    experts = find_any_experts(module, "m.experts", None)
    assert isinstance(experts, CalledExperts)
    assert (experts.layout.d_model, experts.layout.d_hidden, experts.layout.transposed) == (D, H, transposed)
    assert experts.without_weights == spare
    x = torch.randn(6, D)
    for j in range(E):
        assert experts.read(j).shape == (D, H)
        ours = nn.functional.linear(experts.expert_key(x, j), experts.read(j))
        torch.testing.assert_close(ours, torch.stack([module.expert(row, j) for row in x]))
    index = torch.randint(0, E + spare, (6, 3))
    gates = torch.rand(6, 3)
    own = experts.own_sum(module(x, index, gates), (x, index, gates), {})
    wanted = module(x, index, gates * (index < E))
    torch.testing.assert_close(own, wanted)
    experts.read(1).add_(1.0)
    assert not torch.equal(own, experts.own_sum(module(x, index, gates), (x, index, gates), {})) or 1 not in index


def test_projections_that_do_not_fit_each_other_are_refused() -> None:
    module = Called(False)
    module.gate_up_proj = nn.Parameter(torch.zeros(E, 2 * H + 1, D))
    with pytest.raises(LayoutError, match="do not fit"):
        find_any_experts(module, "m.experts", None)
    square = Called(False)
    square.down_proj, square.gate_up_proj = nn.Parameter(torch.zeros(E, 8, 8)), nn.Parameter(torch.zeros(E, 16, 8))
    assert find_any_experts(square, "m.experts", None) is not None


def test_a_norm_behind_each_expert_and_shared_experts() -> None:
    module = Called(False)
    assert find_any_experts(module, "m.shared_experts", None) is None
    module.post_expert_norm = nn.RMSNorm(D)
    assert "normalises" in find_any_experts(module, "m.experts", None).nonlinear


def test_experts_called_otherwise_are_refused() -> None:
    class Two(Called):
        def forward(self, hidden_states: Tensor, gammas: Tensor) -> Tensor:
            return hidden_states

    with pytest.raises(LayoutError, match="is_transposed"):
        find_any_experts(Two(False), "m.experts", None)
    with pytest.raises(LayoutError, match="is_transposed"):
        find_experts(Called(False), "m.experts")


def test_a_product_that_is_not_seen_is_refused() -> None:
    class Hidden(Called):
        def expert(self, x: Tensor, j: int) -> Tensor:
            return (x[:H] * self.down_proj[j]).sum(-1)

    experts = find_any_experts(Hidden(False), "m.experts", None)
    with pytest.raises(LayoutError, match="one key per token"):
        experts.expert_key(torch.randn(2, D), 0)


def test_offloaded_experts_are_refused() -> None:
    with pytest.raises(LayoutError, match="offloaded"):
        find_any_experts(Called(False).to("meta"), "m.experts", None)
    assert find_any_experts(Called(False).to("meta"), "m.experts", None, without_weights=True) is not None


@pytest.mark.parametrize("family", ["llama4", "jetmoe"])
def test_routing_and_keys_of_a_whole_model(family: str) -> None:
    view = MoELayerView(shared_model(family))
    for index, moe in view.layers.items():
        assert check_keys(view, index, IDS, 0) < 1e-5
        assert measured_tail(view, index, IDS, 0).gain == 1.0
        seen: list = []
        with inference_mode_of(view.model), hooks() as handles:
            handles.append(read_routing(moe, seen.append))
            view.model(torch.tensor([IDS]))
        assert len(seen) == 1
        assert seen[0].expert.shape == seen[0].gate.shape == (len(IDS), 2)
        assert (seen[0].expert[:, 0] != seen[0].expert[:, 1]).all()


@pytest.mark.parametrize("family", ["llama4", "jetmoe"])
def test_a_wrong_key_is_noticed(family: str) -> None:
    model = tiny_model(family)
    view = MoELayerView(model)
    experts = view.layers[1].experts
    plain = experts.expert_key
    experts.expert_key = lambda x, j: 1.1 * plain(x, j)
    with pytest.raises(LayoutError, match="differs"):
        check_keys(view, 1, IDS, 0)
