"""Measured properties of a layer: the gain from the experts' output to the layer's output, and refusals."""

from __future__ import annotations

import pytest
import torch
from tiny import CASES, FAMILIES, Behind, assert_same_state, shared_model, state_of, tiny_model, token_ids
from torch import Tensor, nn

from easyedit_moe.errors import LayoutError, NumericalError
from easyedit_moe.moe.capture import capture_facts
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.probe import check_keys, measured_tail, starts_anywhere
from easyedit_moe.moe.tails import IdentityTail, LocalTail

IDS = token_ids(11)


def gain_of(family: str) -> float:
    return {"granitemoe": 0.22, "laguna": 2.5}.get(family, 1.0)


@pytest.mark.parametrize(("family", "how"), [*CASES, ("nemotron_h", "eager"), ("laguna", "eager")])
def test_the_gain_of_a_plain_tail(family: str, how: str) -> None:
    view = MoELayerView(shared_model(family, how))
    for index in view.layers:
        gain = measured_tail(view, index, IDS, 0).gain
        if gain_of(family) == 1.0:
            assert gain == 1.0
        else:
            assert gain == pytest.approx(gain_of(family), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe", "gpt_oss", "modulelist"])
def test_checks_in_half_precision(family: str, dtype: torch.dtype) -> None:
    view = MoELayerView(tiny_model(family, dtype=dtype))
    for index in view.layers:
        assert check_keys(view, index, IDS, 0) < 0.02
        assert measured_tail(view, index, IDS, 0).gain == pytest.approx(gain_of(family), rel=0.01)


@pytest.mark.parametrize("family", [*FAMILIES, "nemotron_h", "laguna"])
def test_gain_and_keys_predict_what_a_real_update_does(family: str) -> None:
    model = tiny_model(family)
    view = MoELayerView(model)
    sequences, positions = [token_ids(6, seed) for seed in range(5)], [5, 0, 3, 2, 4]
    index = max(view.layers)
    before = capture_facts(view, sequences, positions, [index], [index], 0)
    experts = view.layers[index].experts
    update = torch.randn(8, experts.layout.d_model, experts.layout.d_hidden) * 0.1
    for j in range(8):
        experts.read(j).add_(update[j])
    after = capture_facts(view, sequences, positions, [index], [index], 0)
    moved = before.keys[index].dense(8, torch.float32) @ update.permute(0, 2, 1).reshape(-1, experts.layout.d_model)
    gain = measured_tail(view, index, IDS, 0).gain
    assert moved.norm() > 1e-3
    torch.testing.assert_close(after.outputs[index] - before.outputs[index], gain * moved, atol=1e-5, rtol=1e-4)


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class Mixes(nn.Module):
    """Each token also gets those ``reach`` tokens before, or, if it is negative, behind."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach = reach

    def forward(self, x: Tensor) -> Tensor:
        moved = torch.zeros_like(x)
        if self.reach > 0:
            moved[:, self.reach :] = x[:, : -self.reach]
        else:
            moved[:, : self.reach] = x[:, -self.reach :]
        return x + 0.5 * moved


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist"])
@pytest.mark.parametrize(
    ("behind", "match"),
    [
        (Times(0.0), "does not follow"),
        (nn.Hardtanh(-1e-6, 1e-6), "does not|share"),
        (Mixes(-1), "tokens 2 to 3"),
        (Mixes(6), "tokens 3 to 9"),
    ],
)
def test_what_no_change_of_the_experts_moves_alone_is_refused(family: str, behind: nn.Module, match: str) -> None:
    model = tiny_model(family)
    model.model.layers[1].mlp = Behind(model.model.layers[1].mlp, behind)
    view = MoELayerView(model)
    assert measured_tail(view, 0, IDS, 0) == IdentityTail()
    with pytest.raises(LayoutError, match=match):
        measured_tail(view, 1, IDS, 0)


@pytest.mark.parametrize("reach", [1, 4])
def test_a_short_convolution_behind_the_experts_is_noticed(reach: int) -> None:
    model = tiny_model()
    model.model.layers[1].mlp = Behind(model.model.layers[1].mlp, Mixes(reach))
    assert measured_tail(MoELayerView(model), 1, IDS, 0) == LocalTail(reach)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist"])
@pytest.mark.parametrize("behind", [nn.RMSNorm(32), nn.LayerNorm(32), nn.Linear(32, 32), nn.Tanh()])
def test_norms_and_projections_are_known_by_their_jacobian(family: str, behind: nn.Module) -> None:
    model = tiny_model(family)
    model.model.layers[1].mlp = Behind(model.model.layers[1].mlp, behind)
    view = MoELayerView(model)
    assert measured_tail(view, 0, IDS, 0) == IdentityTail()
    assert measured_tail(view, 1, IDS, 0) == LocalTail()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist"])
@pytest.mark.parametrize("factor", [0.22, -1.5, 1.3])
def test_a_factor_behind_the_block_is_measured(family: str, factor: float) -> None:
    model = tiny_model(family)
    model.model.layers[1].mlp = Behind(model.model.layers[1].mlp, Times(factor))
    assert measured_tail(MoELayerView(model), 1, IDS, 0).gain == pytest.approx(factor, rel=1e-4)


@pytest.mark.parametrize("family", ["gemma4", "nemotron_latent"])
def test_families_with_a_norm_or_a_projection_behind_the_experts(family: str) -> None:
    view = MoELayerView(shared_model(family))
    for index in view.layers:
        assert check_keys(view, index, IDS, 0) < 1e-5
        assert measured_tail(view, index, IDS, 0) == LocalTail()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist"])
def test_checks_name_weights_that_are_not_finite(family: str) -> None:
    view = MoELayerView(tiny_model(family))
    for j in range(8):
        view.layers[1].experts.read(j).fill_(float("nan"))
    for check in (check_keys, measured_tail):
        assert check(view, 0, IDS, 0) is not None
        with pytest.raises(NumericalError, match="NaN or infinity"):
            check(view, 1, IDS, 0)


@pytest.mark.parametrize(("family", "how"), CASES)
def test_checks_leave_the_model_as_it_was(family: str, how: str) -> None:
    model = tiny_model(family, implementation=how)
    model.train()
    model.model.layers[1].eval()
    before = state_of(model)
    view = MoELayerView(model)
    check_keys(view, 2, IDS, 0)
    measured_tail(view, 2, IDS, 0)
    assert_same_state(before, state_of(model))
    view.decoder_layers[2].register_forward_hook(lambda *_: 1 / 0)
    before = state_of(model)
    for check in (check_keys, measured_tail):
        with pytest.raises(ZeroDivisionError):
            check(view, 2, IDS, 0)
    assert_same_state(before, state_of(model))


def test_checks_stop_after_their_layer() -> None:
    model = tiny_model()
    calls: list[int] = []
    model.model.layers[2].register_forward_pre_hook(lambda *_: calls.append(1))
    view = MoELayerView(model)
    check_keys(view, 1, IDS, 0)
    measured_tail(view, 1, IDS, 0)
    assert not calls


@pytest.mark.parametrize("family", [*FAMILIES, "nemotron_h"])
def test_forwards_start_at_any_layer(family: str) -> None:
    view = MoELayerView(shared_model(family))
    assert starts_anywhere(view, sorted(view.layers), IDS, 0)


def test_layers_that_talk_past_one_another_are_noticed() -> None:
    model, kept = tiny_model(), []
    model.model.layers[0].register_forward_hook(lambda _, __, out: kept.append(out))
    model.model.layers[2].register_forward_hook(lambda _, __, out: out + 0.1 * kept[-1])
    assert not starts_anywhere(MoELayerView(model), [1, 2], IDS, 0)
