"""Where the MoE layers of a model are, and which may be edited."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, OldStyleBlock, OldStyleExpert, shared_model, tiny_model, tiny_multimodal, token_ids
from torch import nn

from easyedit_moe.errors import DenseModelError, LayerError, LayoutError
from easyedit_moe.moe.capture import capture_facts
from easyedit_moe.moe.layers import MoELayerView


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_every_family(family: str) -> None:
    model = shared_model(family)
    view = MoELayerView(model)
    first = 1 if family in ("deepseek_v3", "glm4_moe") else 0
    assert sorted(view.layers) == list(range(first, 4))
    assert (view.num_layers, view.stack_name) == (4, "model.layers")
    for index, moe in view.layers.items():
        assert moe.index == index
        assert moe.name == f"model.layers.{index}"
        assert moe.layer is model.model.layers[index] is view.decoder_layers[index]
        assert moe.block in list(moe.layer.children())
        assert moe.experts.module in list(moe.block.children())
        assert moe.output_site is moe.block


def test_experts_in_the_decoder_layer_itself() -> None:
    view = MoELayerView(shared_model("gemma4"))
    for moe in view.layers.values():
        assert moe.block is moe.layer
        assert moe.output_site is moe.experts.module is moe.layer.experts


@pytest.mark.parametrize("name", ["qwen3_5_moe", "qwen3_vl_moe"])
def test_text_decoder_of_a_multimodal_model(name: str) -> None:
    model = tiny_multimodal(name)
    view = MoELayerView(model)
    assert view.stack_name == "model.language_model.layers"
    assert view.decoder_layers is model.model.language_model.layers
    assert len(model.model.visual.blocks) == 2
    assert sorted(view.layers) == [0, 1, 2, 3]
    assert set(view.layers[3].parameter_names()) <= set(dict(model.named_parameters()))
    state = capture_facts(view, [token_ids(7)], [6], [2], [2], 0)
    with torch.no_grad():
        wanted = model(torch.tensor([token_ids(7)]), output_hidden_states=True).hidden_states[3][0, 6]
    torch.testing.assert_close(state.outputs[2][0], wanted, atol=1e-5, rtol=1e-5)


class TwoTowers(nn.Module):
    """Two stacks of the same name, dense first, as in audio and vision models."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Module()
        self.vision.layers = nn.ModuleList(OldStyleExpert(32, 24) for _ in range(2))
        self.text = tiny_model("qwen3_moe").model


class Picks(TwoTowers):
    def get_decoder(self) -> nn.Module:
        return self.text


class PicksAStranger(TwoTowers):
    def get_decoder(self) -> nn.Module:
        return nn.Linear(1, 1)


def test_get_decoder_picks_the_stack() -> None:
    view = MoELayerView(Picks())
    assert (view.stack_name, view.num_layers, sorted(view.layers)) == ("text.layers", 4, [0, 1, 2, 3])
    assert view.layers[0].parameter_names() == ["text.layers.0.mlp.experts.down_proj"]


@pytest.mark.parametrize("make", [TwoTowers, PicksAStranger])
def test_several_stacks_without_a_decoder_among_them_are_refused(make) -> None:
    with pytest.raises(LayoutError, match=r"vision\.layers.*text\.layers"):
        MoELayerView(make())


def test_a_base_model_without_head_works() -> None:
    view = MoELayerView(shared_model("qwen3_moe").model)
    assert (view.stack_name, sorted(view.layers)) == ("layers", [0, 1, 2, 3])
    assert view.layers[1].parameter_names() == ["layers.1.mlp.experts.down_proj"]


@pytest.mark.parametrize("name", ["layers", "h", "blocks", "layer"])
def test_other_names_of_the_stack(name: str) -> None:
    model = nn.Module()
    model.transformer = nn.Module()
    setattr(model.transformer, name, tiny_model("modulelist").model.layers)
    view = MoELayerView(model)
    assert (view.stack_name, sorted(view.layers)) == (f"transformer.{name}", [0, 1, 2, 3])


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(DenseModelError, match="4 decoder layers"):
        MoELayerView(shared_model("dense"))


@pytest.mark.parametrize(
    ("family", "block", "experts"),
    [("llama4", "feed_forward", "feed_forward.experts"), ("jetmoe", "mlp", "mlp.output_linear")],
)
def test_families_with_a_layout_of_their_own(family: str, block: str, experts: str) -> None:
    model = shared_model(family)
    for index, moe in MoELayerView(model).layers.items():
        assert moe.block is model.get_submodule(f"model.layers.{index}.{block}")
        assert moe.experts_name == f"model.layers.{index}.{experts}"


def test_an_encoder_with_a_decoder_is_refused() -> None:
    model = tiny_model("qwen3_moe")
    model.config.is_encoder_decoder = True
    with pytest.raises(LayoutError, match="encoder with a decoder"):
        MoELayerView(model)


def test_a_model_without_a_stack_is_refused() -> None:
    with pytest.raises(LayoutError, match="no list of decoder layers"):
        MoELayerView(nn.Sequential(nn.Linear(2, 2)))


def test_two_collections_in_one_layer_are_refused() -> None:
    model = tiny_model("modulelist")
    model.model.layers[2].second = OldStyleBlock(tiny_model("qwen3_moe").model.layers[0].mlp, shared=False)
    with pytest.raises(LayoutError, match="ambiguous"):
        MoELayerView(model)


def test_a_modulelist_of_experts_without_a_block_is_refused() -> None:
    model = tiny_model("modulelist")
    layer = model.model.layers[2]
    layer.experts = layer.mlp.experts
    layer.mlp = nn.Identity()
    with pytest.raises(LayoutError, match="without a MoE block"):
        MoELayerView(model)


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ([], "empty"),
        ((), "empty"),
        ([2, 1], "increasing"),
        ([1, 1], "increasing"),
        ([1, 4], r"\[4\] are out of range.*0 to 3"),
        ([-1], "out of range"),
        ([0, 1], r"\[0\] are dense.*\[1, 2, 3\]"),
        ([True, 2], "whole numbers"),
        (["1"], "whole numbers"),
        ("12", "whole numbers"),
        ([1.0], "whole numbers"),
        ([None], "whole numbers"),
    ],
)
def test_layers_that_can_not_be_edited(layers, match: str) -> None:
    view = MoELayerView(shared_model("deepseek_v3"))
    with pytest.raises(LayerError, match=match):
        view.require(layers)


def test_layers_that_can() -> None:
    view = MoELayerView(shared_model("deepseek_v3"))
    assert [moe.index for moe in view.require([1, 3])] == [1, 3]
    assert [moe.index for moe in view.require((2,))] == [2]


def test_experts_of_other_senses_are_left_out() -> None:
    model = tiny_model("qwen3_moe")
    for layer in model.model.layers:
        both = nn.Module()
        both.text_moe, both.vision_moe = layer.mlp, tiny_model("qwen3_moe", seed=1).model.layers[0].mlp
        layer.mlp = both
    for index, moe in MoELayerView(model).layers.items():
        assert moe.experts_name == f"model.layers.{index}.mlp.text_moe.experts"
        assert moe.block is model.model.layers[index].mlp


def test_experts_as_rows_of_an_embedding_are_refused_and_not_called_dense() -> None:
    model = tiny_model("dense")
    for layer in model.model.layers:
        layer.mlp.num_experts, layer.mlp.up_embed = 8, nn.Embedding(8, 32)
    with pytest.raises(LayoutError, match="routing of all tokens") as caught:
        MoELayerView(model)
    assert not isinstance(caught.value, DenseModelError)


class ParallelExperts(nn.Module):
    """As GraniteMoE stored its experts in transformers 5.5: named by class only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 32, 24))


def test_experts_known_by_their_class_only_are_not_called_dense() -> None:
    model = tiny_model("dense")
    for layer in model.model.layers:
        layer.mlp.input_linear = ParallelExperts()
    with pytest.raises(LayoutError, match=r"input_linear \(ParallelExperts\)") as caught:
        MoELayerView(model)
    assert not isinstance(caught.value, DenseModelError)
