"""What a decoder layer returns, and how it is put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_model, token_ids
from torch import Tensor, nn

from easyedit_moe.errors import LayoutError
from easyedit_moe.moe.capture import capture_facts
from easyedit_moe.moe.embeddings import input_embeddings, output_embeddings
from easyedit_moe.moe.layer_outputs import LayerOutput, layer_output, replace_layer_output
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.probe import starts_anywhere
from easyedit_moe.moe.upper_layers import ShiftedSequence, UpperLayers


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 5, 4)])
@pytest.mark.parametrize("more", [None, (), (None,), (torch.arange(6).view(2, 3), "flag")])
def test_an_output_is_taken_apart_and_put_back(shape: tuple[int, ...], more: tuple[Any, ...] | None) -> None:
    hidden = torch.randn(shape)
    output = hidden if more is None else (hidden, *more)
    apart = LayerOutput.of(output)
    assert torch.equal(apart.hidden, hidden.reshape(2, 3, -1))
    back = apart.put_back(apart.hidden + 1)
    assert isinstance(back, Tensor) == (more is None)
    assert torch.equal(back if more is None else back[0], hidden + 1)
    assert more is None or back[1:] == tuple(more)
    assert torch.equal(layer_output(replace_layer_output(output, apart.hidden * 2)), apart.hidden * 2)
    assert torch.equal(layer_output(apart.pass_on(hidden)), apart.hidden)
    one = apart.select(torch.tensor([1]))
    assert torch.equal(one.hidden[0], apart.hidden[1])
    assert not apart.has_more or torch.equal(one.more[0], torch.tensor([[3, 4, 5]]))


@pytest.mark.parametrize("output", [None, {}, (), "ab", {"hidden": torch.zeros(1)}, (None, torch.zeros(1))])
def test_what_holds_no_hidden_states_is_refused(output: Any) -> None:
    with pytest.raises(LayoutError, match="hidden states"):
        LayerOutput.of(output)


class Hands(nn.Module):
    """A decoder layer that also returns something, and needs what the layer before returned."""

    def __init__(self, layer: nn.Module, needs: bool, per_token: bool) -> None:
        super().__init__()
        self.layer, self.needs, self.per_token = layer, needs, per_token

    def forward(self, hidden_states: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        hidden, carried = hidden_states if isinstance(hidden_states, tuple) else (hidden_states, None)
        if self.needs and carried is not None:
            hidden = hidden + carried.reshape(hidden.shape)
        out = self.layer(hidden, **kwargs)
        return out, (0.1 * out.flatten(0, 1) if self.per_token else 0.1 * out)


class Unpacks(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden: Any) -> Tensor:
        return self.norm(hidden[0])


def model_whose_layers_hand_on(needs: bool, per_token: bool) -> nn.Module:
    model = tiny_model()
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = Hands(layer, needs, per_token)
    model.model.norm = Unpacks(model.model.norm)
    return model


@pytest.mark.parametrize("needs", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_layers_that_hand_on_tensors_are_shifted_exactly(needs: bool, per_token: bool) -> None:
    model = model_whose_layers_hand_on(needs, per_token)
    view = MoELayerView(model)
    assert isinstance(starts_anywhere(view, [1, 2], token_ids(9), 0), bool)
    ids = [token_ids(7, 1), token_ids(5, 2)]
    upper = UpperLayers(view, 1, 0, [ShiftedSequence(tuple(s), 3, (len(s) - 1,)) for s in ids])
    shift = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = upper.logits(shift)
    for row, sequence in enumerate(ids):

        def add(module: nn.Module, args: tuple, output: Any, row: int = row) -> Any:
            hidden = output[0].clone()
            hidden[0, 3] += shift[row]
            return (hidden, output[1])

        hook = model.model.layers[1].register_forward_hook(add)
        with torch.no_grad():
            wanted = model(torch.tensor([sequence])).logits[0, -1]
        hook.remove()
        torch.testing.assert_close(found[row], wanted, atol=1e-4, rtol=1e-4)


def test_several_streams_are_read_as_one_vector() -> None:
    model = tiny_model()
    model.model.layers[2].register_forward_hook(lambda _, __, out: out)
    view = MoELayerView(model)
    plain = capture_facts(view, [token_ids(6)], [4], [], [2], 0).outputs[2]
    model.model.layers[2].register_forward_hook(lambda _, __, out: torch.stack([out, 2 * out], dim=2))
    double = capture_facts(view, [token_ids(6)], [4], [], [2], 0).outputs[2]
    assert torch.equal(double, torch.cat([plain, 2 * plain], dim=1))


class Wrapper(nn.Module):
    """Knows of no embeddings itself, like wrappers around a language model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.language_model = model

    def get_output_embeddings(self) -> None:
        return None

    def get_input_embeddings(self) -> None:
        raise NotImplementedError


def test_embeddings_of_a_nested_model() -> None:
    model = tiny_model()
    assert output_embeddings(Wrapper(model)) is model.lm_head
    assert input_embeddings(Wrapper(model)) is model.model.embed_tokens
    with pytest.raises(LayoutError, match="get_output_embeddings"):
        output_embeddings(Wrapper(nn.Linear(2, 2)))
