"""The experts interface: sums, orientation, views, and what is refused."""

from __future__ import annotations

from functools import wraps

import pytest
import torch
from tiny import (
    CASES,
    FAMILIES,
    OldStyleExpert,
    reference_key,
    shared_model,
    tiny_model,
    token_ids,
)
from torch import Tensor, nn

from easyedit_moe.errors import LayoutError, QuantizedExpertsError
from easyedit_moe.moe.capture import hooks, inference_mode_of, read_routing
from easyedit_moe.moe.experts import find_experts
from easyedit_moe.moe.layer_outputs import layer_output
from easyedit_moe.moe.layers import MoELayer, MoELayerView
from easyedit_moe.moe.probe import check_keys, expert_sum

ALL_CASES = [
    *CASES,
    ("nemotron_h", "eager"),
    ("nemotron_h", "grouped_mm"),
    ("laguna", "eager"),
    ("gpt_oss", "batched_mm"),
]


def experts_output(moe: MoELayer, outputs: dict[str, Tensor]) -> Tensor:
    """What the experts added up to in a real forward; for ModuleList, the block's output less the shared expert."""
    return outputs["block"] - outputs["shared"] if moe.experts.layout.storage == "modulelist" else outputs["experts"]


@pytest.mark.parametrize(("family", "how"), ALL_CASES)
def test_sum_of_gated_experts_is_the_modules_own_output(family: str, how: str) -> None:
    model = shared_model(family, how)
    view = MoELayerView(model)
    ours: dict[int, Tensor] = {}
    theirs: dict[int, dict[str, Tensor]] = {index: {} for index in view.layers}

    def keep(index: int, what: str):
        return lambda _, __, out: theirs[index].__setitem__(what, layer_output(out).reshape(-1, 32))

    with inference_mode_of(model), hooks() as handles:
        for index, moe in view.layers.items():
            handles.append(
                read_routing(moe, lambda routing, i=index, m=moe: ours.__setitem__(i, expert_sum(m, routing)))
            )
            if family == "modulelist":
                handles.append(moe.block.register_forward_hook(keep(index, "block")))
                handles.append(moe.block.shared_expert.register_forward_hook(keep(index, "shared")))
            else:
                handles.append(moe.experts.module.register_forward_hook(keep(index, "experts")))
        model(torch.tensor(token_ids(44)).reshape(4, 11), use_cache=False)
    assert sorted(ours) == sorted(view.layers)
    assert len(ours) >= 2
    for index, moe in view.layers.items():
        wanted = experts_output(moe, theirs[index])
        assert wanted.norm() > 1e-3
        torch.testing.assert_close(ours[index], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "how"), ALL_CASES)
def test_check_keys_passes_on_every_layer(family: str, how: str) -> None:
    view = MoELayerView(shared_model(family, how))
    for index in view.layers:
        error = check_keys(view, index, token_ids(15), 0)
        assert 0 <= error < 1e-5


@pytest.mark.parametrize("family", [*FAMILIES, "nemotron_h"])
def test_keys_follow_the_familys_formula(family: str) -> None:
    for moe in MoELayerView(shared_model(family)).layers.values():
        x = torch.randn(9, 32) * 3
        expert = torch.tensor([5, 0, 7, 5, 5, 2, 0, 1, 7])
        with torch.no_grad():
            keys = moe.experts.keys(x, expert)
            wanted = torch.cat([reference_key(moe.experts.module, x[i : i + 1], int(j)) for i, j in enumerate(expert)])
            alone = moe.experts.expert_key(x[:3], 5)
        torch.testing.assert_close(keys.double(), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone[0], keys[0], atol=1e-6, rtol=1e-5)
        assert moe.experts.keys(x[:0], expert[:0]).shape == (0, moe.experts.layout.d_hidden)


def alone(moe: MoELayer, x: Tensor, expert: int) -> Tensor:
    """Output of the real module with one expert picked at gate 1, bias taken off."""
    module = moe.experts.module
    with torch.no_grad():
        if isinstance(module, nn.ModuleList):
            return module[expert](x)
        out = module(x, torch.full((len(x), 1), expert), torch.ones(len(x), 1))
        bias = moe.experts.expert_bias(expert)
    return out if bias is None else out - bias


@pytest.mark.parametrize("how", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", [*FAMILIES, "nemotron_h"])
def test_orientation_and_expert_axis_show_in_the_modules_own_output(family: str, how: str) -> None:
    moe = next(iter(MoELayerView(tiny_model(family, implementation=how)).layers.values()))
    layout, x = moe.experts.layout, torch.randn(6, 32)
    with torch.no_grad():
        key = moe.experts.expert_key(x, 3).float()
    moe.experts.read(3).zero_()
    moe.experts.read(3)[5] = 1.0
    row = alone(moe, x, 3)
    wanted = torch.zeros(6, layout.d_model)
    wanted[:, 5] = key.sum(1)
    torch.testing.assert_close(row, wanted, atol=1e-5, rtol=1e-5)

    moe.experts.read(3).zero_()
    moe.experts.read(3)[:, 7] = torch.arange(1.0, layout.d_model + 1)
    column = alone(moe, x, 3)
    torch.testing.assert_close(column, key[:, 7:8] * torch.arange(1.0, layout.d_model + 1), atol=1e-4, rtol=1e-5)

    moe.experts.read(3).zero_()
    assert torch.equal(alone(moe, x, 3).abs().max(), torch.tensor(0.0))
    assert alone(moe, x, 2).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_storage_of_a_pattern_with_other_values_along_every_axis(family: str) -> None:
    experts = MoELayerView(tiny_model(family)).require([2])[0].experts
    d, h = experts.layout.d_model, experts.layout.d_hidden
    assert (d, h) == (32, 32 if family == "gpt_oss" else 24)
    for j in range(8):
        experts.read(j).copy_(1e4 * j + 100 * torch.arange(d)[:, None] + torch.arange(h)[None, :])
    for j, a, b in [(0, 0, 0), (1, 2, 3), (7, d - 1, h - 1), (5, 31, 0), (4, 0, 23)]:
        value = 1e4 * j + 100 * a + b
        if family == "modulelist":
            assert experts.module[j].down_proj.weight[a, b] == value
        elif family == "gpt_oss":
            assert experts.module.down_proj[j, b, a] == value
        else:
            assert experts.module.down_proj[j, a, b] == value
        assert experts.stacked()[j, a, b] == value


@pytest.mark.parametrize("family", FAMILIES)
def test_read_is_a_view_and_stacked_a_copy(family: str) -> None:
    model = tiny_model(family)
    moe = MoELayerView(model).require([1])[0]
    experts, ids = moe.experts, torch.tensor([token_ids(9)])
    with torch.no_grad():
        before = model(ids).logits
    stacked = experts.stacked()
    assert stacked.shape == (8, experts.layout.d_model, experts.layout.d_hidden)
    assert stacked.dtype == torch.float32
    assert experts.stacked(torch.float64).dtype == torch.float64
    kept = stacked.clone()
    for j in range(8):
        assert torch.equal(stacked[j], experts.read(j))
        assert not experts.read(j).requires_grad
        experts.read(j).add_(1.0)
        assert torch.equal(experts.read(j), kept[j] + 1)
    assert torch.equal(stacked, kept)
    with torch.no_grad():
        assert (model(ids).logits - before).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_their_names(family: str) -> None:
    model = shared_model(family)
    named = dict(model.named_parameters())
    for moe in MoELayerView(model).layers.values():
        names, held = moe.parameter_names(), [p for _, p in moe.experts.parameters()]
        assert len(names) == len(held) == (8 if family == "modulelist" else 1)
        assert all(named[name] is parameter for name, parameter in zip(names, held, strict=True))
        assert model.get_submodule(moe.experts_name) is moe.experts.module
        for j in range(8):
            name, parameter = moe.experts.parameters_of(j)
            assert named[f"{moe.experts_name}.{name}"] is parameter
            assert moe.experts.read(j).untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()


def test_layouts() -> None:
    def layout(family: str):
        return MoELayerView(shared_model(family)).require([1])[0].experts.layout

    oss, qwen, old, plain = layout("gpt_oss"), layout("qwen3_moe"), layout("modulelist"), layout("nemotron_h")
    assert (oss.transposed, oss.biased, oss.gated, oss.storage) == (True, True, True, "packed")
    assert (qwen.transposed, qwen.biased, qwen.gated, qwen.storage) == (False, False, True, "packed")
    assert (old.transposed, old.biased, old.gated, old.storage) == (False, False, True, "modulelist")
    assert (plain.gated, plain.num_experts, plain.d_model, plain.d_hidden) == (False, 8, 32, 24)
    assert {oss.dtype, qwen.dtype, old.dtype} == {torch.float32}
    assert layout("gpt_oss").num_experts == 8


class MixtralExpert(nn.Module):
    """Mixtral's old names, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
        self.w2 = nn.Linear(4, 6, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


def test_modulelist_with_mixtrals_names_and_biases() -> None:
    module = nn.ModuleList(MixtralExpert() for _ in range(3))
    experts = find_experts(module, "model.layers.0.block_sparse_moe.experts")
    assert (experts.layout.d_model, experts.layout.d_hidden, experts.layout.num_experts) == (6, 4, 3)
    assert experts.layout.biased
    assert experts.layout.gated
    assert [name for name, _ in experts.parameters()] == ["0.w2.weight", "1.w2.weight", "2.w2.weight"]
    x = torch.randn(5, 6)
    with torch.no_grad():
        ours = experts.expert_key(x, 1) @ experts.read(1).T + experts.expert_bias(1)
        torch.testing.assert_close(ours, module[1](x))
    assert not module[1].w2._forward_pre_hooks


class Packed(nn.Module):
    """A packed collection of 4 experts, d 6, h 8, that follows the protocol unless told otherwise."""

    def __init__(self, down: tuple = (4, 6, 8), up: tuple = (4, 16, 6), **flags: object) -> None:
        super().__init__()
        self.num_experts = 4
        self.down_proj = nn.Parameter(torch.randn(down))
        self.gate_up_proj = nn.Parameter(torch.randn(up))
        flags = {"is_transposed": False, "has_bias": False, "has_gate": True, **flags}
        for name, value in flags.items():
            if value is not None:
                setattr(self, name, value)


@pytest.mark.parametrize("flag", ["is_transposed", "has_bias", "has_gate"])
def test_packed_experts_without_a_protocol_flag_are_refused(flag: str) -> None:
    assert find_experts(Packed(), "m.experts").layout.d_hidden == 8
    with pytest.raises(LayoutError, match=flag) as caught:
        find_experts(Packed(**{flag: None}), "m.experts")
    assert not isinstance(caught.value, QuantizedExpertsError)


@pytest.mark.parametrize(
    ("down", "up", "flags"),
    [
        ((4, 6, 8), (4, 16, 6), {"is_transposed": True}),
        ((4, 8, 6), (4, 6, 16), {}),
        ((4, 6, 8), (4, 8, 6), {}),
        ((4, 6, 8), (4, 16, 5), {}),
        ((4, 6, 8), (64, 6), {}),
        ((4, 6, 8), (4, 16, 6), {"has_gate": False}),
    ],
)
def test_shapes_that_do_not_fit_the_flags_are_refused(down: tuple, up: tuple, flags: dict) -> None:
    with pytest.raises(LayoutError, match="unknown"):
        find_experts(Packed(down, up, **flags), "m.experts")


def test_a_norm_behind_each_expert_is_refused() -> None:
    assert "normalises" in find_experts(Packed(has_post_expert_norm=True), "m.experts").nonlinear
    assert not find_experts(Packed(has_post_expert_norm=False), "m.experts").nonlinear
    view = MoELayerView(tiny_model())
    view.layers[1].experts.nonlinear = "It normalises."
    assert check_keys(view, 0, token_ids(9), 0) < 1e-5
    with pytest.raises(LayoutError, match="normalises"):
        check_keys(view, 1, token_ids(9), 0)


def test_transposed_square_experts_read_the_other_way_round_are_refused() -> None:
    model = tiny_model("gpt_oss")
    model.model.layers[1].mlp.experts.is_transposed = False
    with pytest.raises(LayoutError, match="do not fit"):
        MoELayerView(model)


def forget_biases(module: nn.Module) -> None:
    module.has_bias = False


def normalise_unannounced(module: nn.Module) -> None:
    plain = module.forward

    @wraps(plain)
    def forward(*args: object, **kwargs: object) -> Tensor:
        return nn.functional.rms_norm(plain(*args, **kwargs), (32,))

    module.forward = forward


def answer_nan_keys(module: nn.Module) -> None:
    module._apply_gate = lambda hidden: hidden[:, :32] * float("nan")
    right = type(module)._apply_gate
    plain = module.forward

    @wraps(plain)
    def forward(*args: object, **kwargs: object) -> Tensor:
        wrong, module._apply_gate = module._apply_gate, right.__get__(module)
        out = plain(*args, **kwargs)
        module._apply_gate = wrong
        return out

    module.forward = forward


@pytest.mark.parametrize("lie", [forget_biases, normalise_unannounced, answer_nan_keys])
def test_check_keys_finds_what_flags_and_shapes_hide(lie) -> None:
    model = tiny_model("gpt_oss")
    lie(model.model.layers[1].mlp.experts)
    view = MoELayerView(model)
    assert check_keys(view, 2, token_ids(9), 0) < 1e-5
    with pytest.raises(LayoutError, match="own output"):
        check_keys(view, 1, token_ids(9), 0)


def test_check_keys_finds_a_modulelist_that_is_not_linear_in_its_down_projections() -> None:
    model = tiny_model("modulelist")
    experts = model.model.layers[1].mlp.experts

    def curved(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return torch.tanh(output)

    for expert in experts:
        expert.register_forward_hook(curved)
    view = MoELayerView(model)
    assert check_keys(view, 0, token_ids(9), 0) < 1e-5
    with pytest.raises(LayoutError, match="own output"):
        check_keys(view, 1, token_ids(9), 0)


def float8(module: Packed) -> None:
    module.down_proj = nn.Parameter(module.down_proj.data.to(torch.float8_e4m3fn), requires_grad=False)


def packed_4bit(module: Packed) -> None:
    module.down_proj = nn.Parameter(torch.zeros(96, 1, dtype=torch.uint8), requires_grad=False)
    module.down_proj.quant_state = object()


def float_with_quant_state(module: Packed) -> None:
    module.down_proj.quant_state = object()


class Wrapped(torch.Tensor):
    """As torchao's tensors: a float dtype outside, another storage inside."""


def tensor_subclass(module: Packed) -> None:
    module.down_proj = nn.Parameter(torch.Tensor._make_subclass(Wrapped, torch.zeros(4, 6, 8)))


def mxfp4(module: Packed) -> None:
    del module.down_proj
    module.down_proj_blocks = nn.Parameter(torch.zeros(4, 6, 1, 16, dtype=torch.uint8), requires_grad=False)
    module.down_proj_scales = nn.Parameter(torch.zeros(4, 6, 1, dtype=torch.uint8), requires_grad=False)


def fp8_scales(module: Packed) -> None:
    module.down_proj_scale_inv = nn.Parameter(torch.ones(4, 1, 1))


@pytest.mark.parametrize("quantise", [float8, packed_4bit, float_with_quant_state, tensor_subclass, mxfp4, fp8_scales])
def test_quantised_packed_experts_are_refused(quantise) -> None:
    module = Packed()
    quantise(module)
    with pytest.raises(QuantizedExpertsError, match="dequantised"):
        find_experts(module, "m.experts")


class Int8Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.int8), requires_grad=False)


class GPTQLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(1, 4, dtype=torch.int32))


class FloatButNoLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 4))


def linear_with_quant_state() -> nn.Module:
    linear = nn.Linear(4, 6)
    linear.weight.quant_state = object()
    return linear


@pytest.mark.parametrize("make", [Int8Linear, GPTQLinear, FloatButNoLinear, linear_with_quant_state])
def test_quantised_modulelist_experts_are_refused(make) -> None:
    module = nn.ModuleList(OldStyleExpert(6, 4) for _ in range(3))
    assert find_experts(module, "m.experts") is not None
    for expert in module:
        expert.down_proj = make()
    with pytest.raises(QuantizedExpertsError, match="dequantised"):
        find_experts(module, "m.experts")


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(4, 6)


def test_modulelists_of_unknown_naming_or_of_unequal_experts_are_refused() -> None:
    with pytest.raises(LayoutError, match="down_proj or w2") as caught:
        find_experts(nn.ModuleList(Unknown() for _ in range(3)), "m.experts")
    assert not isinstance(caught.value, QuantizedExpertsError)
    with pytest.raises(LayoutError, match="expert 1 differs"):
        find_experts(nn.ModuleList([OldStyleExpert(6, 4), OldStyleExpert(6, 5)]), "m.experts")


def test_offloaded_experts_are_refused() -> None:
    for module in (Packed(), nn.ModuleList(OldStyleExpert(6, 4) for _ in range(3))):
        with pytest.raises(LayoutError, match="offloaded"):
            find_experts(module.to("meta"), "m.experts")


def test_what_is_no_collection_of_experts() -> None:
    assert find_experts(OldStyleExpert(6, 4), "m.mlp") is None
    assert find_experts(nn.ModuleList(OldStyleExpert(6, 4) for _ in range(3)), "m.layers") is None
    assert find_experts(nn.ModuleList([OldStyleExpert(6, 4)]), "m.experts") is None
    assert find_experts(nn.Linear(2, 3), "m.experts") is None
