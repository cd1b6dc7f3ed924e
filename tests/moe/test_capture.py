"""Routed keys and layer outputs of fact tokens, against single unpadded forwards."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from tiny import (
    CASES,
    FAMILIES,
    assert_same_state,
    reference_key,
    shared_model,
    state_of,
    tiny_model,
    token_ids,
)
from torch import Tensor, nn

from easyedit_moe.algebra.routed_keys import RoutedKeys
from easyedit_moe.errors import LayoutError, NumericalError, RequestError
from easyedit_moe.facts.tokens import collate
from easyedit_moe.moe.capture import (
    FactStates,
    LayerInputs,
    Routing,
    capture_facts,
    experts_on_some,
    frozen_parameters,
    hooks,
    inference_mode_of,
    read_routing,
    run,
    stop_after,
)
from easyedit_moe.moe.layers import MoELayerView

LENGTHS = (7, 3, 12, 7, 1, 9, 5)
SEQUENCES = [token_ids(length, seed) for seed, length in enumerate(LENGTHS)]
POSITIONS = [6, 0, 5, 2, 0, 8, 1]
KEY_LAYERS, OUTPUT_LAYERS = [1, 2], [0, 2]


def capture(view: MoELayerView, batch_size: int = 3, which: list[int] | None = None) -> FactStates:
    which = list(range(len(SEQUENCES))) if which is None else which
    sequences, positions = [SEQUENCES[i] for i in which], [POSITIONS[i] for i in which]
    return capture_facts(view, sequences, positions, KEY_LAYERS, OUTPUT_LAYERS, pad=0, batch_size=batch_size)


def reference_routing(moe, inputs: dict[str, tuple]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, experts and gates of one unpadded sequence; recomputed for the old-style block."""
    if moe.experts.layout.storage == "packed":
        return inputs["experts"]
    hidden = inputs["block"][0].reshape(-1, 32)
    gate, expert = torch.softmax(moe.block.gate(hidden), dim=-1).topk(moe.block.top_k, dim=-1)
    return hidden, expert, gate / gate.sum(-1, keepdim=True)


def reference_design(model: nn.Module, ids: list[int], position: int, layer: int) -> tuple[Tensor, Tensor]:
    """``psi [E, h]`` and gates ``[E]`` at one position in float64, from one forward of this sequence alone."""
    moe = MoELayerView(model).layers[layer]
    inputs: dict[str, tuple] = {}
    handles = [moe.block.register_forward_pre_hook(lambda _, args: inputs.__setitem__("block", args))]
    if moe.experts.layout.storage == "packed":
        handles.append(
            moe.experts.module.register_forward_pre_hook(lambda _, args: inputs.__setitem__("experts", args))
        )
    with torch.no_grad():
        model(torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        hidden, expert, gate = reference_routing(moe, inputs)
        psi, gates = torch.zeros(8, moe.experts.layout.d_hidden, dtype=torch.float64), torch.zeros(8).double()
        for j, g in zip(expert[position].tolist(), gate[position].tolist(), strict=True):
            psi[j] += g * reference_key(moe.experts.module, hidden[position : position + 1], j)[0]
            gates[j] += g
    return psi, gates


def gate_matrix(keys: RoutedKeys) -> Tensor:
    return torch.zeros(keys.num_tokens, 8).double().scatter_add_(1, keys.expert, keys.gate.double())


@pytest.mark.parametrize(("family", "how"), CASES)
def test_keys_gates_and_experts_equal_single_forwards(family: str, how: str) -> None:
    model = shared_model(family, how)
    state = capture(MoELayerView(model))
    active = 2 if family == "mixtral" else 3
    assert sorted(state.keys) == KEY_LAYERS
    for layer, keys in state.keys.items():
        h = keys.d_hidden
        assert keys.expert.shape == keys.gate.shape == (7, active)
        assert keys.key.shape == (7, active, h)
        assert (keys.expert.dtype, keys.gate.dtype, keys.key.dtype) == (torch.int64, torch.float32, torch.float32)
        wanted = [reference_design(model, ids, at, layer) for ids, at in zip(SEQUENCES, POSITIONS, strict=True)]
        psi = torch.stack([design for design, _ in wanted])
        gates = torch.stack([gate for _, gate in wanted])
        assert torch.equal(gate_matrix(keys) != 0, gates != 0)
        assert ((gates != 0).sum(1) == active).all()
        torch.testing.assert_close(gate_matrix(keys), gates, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(keys.dense(8), psi.reshape(7, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "how"), CASES)
def test_layer_outputs_equal_hidden_states(family: str, how: str) -> None:
    model = shared_model(family, how)
    state = capture(MoELayerView(model))
    assert sorted(state.outputs) == OUTPUT_LAYERS
    for i, (ids, at) in enumerate(zip(SEQUENCES, POSITIONS, strict=True)):
        with torch.no_grad():
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for layer in OUTPUT_LAYERS:
            assert state.outputs[layer].dtype == torch.float32
            torch.testing.assert_close(state.outputs[layer][i], hidden[layer + 1][0, at], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "how"), CASES)
def test_batches_and_their_order_do_not_matter(family: str, how: str) -> None:
    view = MoELayerView(shared_model(family, how))
    base = capture(view, batch_size=64)
    order = [4, 0, 6, 5, 2, 3, 1]
    for batch_size, which in [(1, list(range(7))), (2, order), (64, order), (3, [5, 0])]:
        other = capture(view, batch_size, which)
        for layer in KEY_LAYERS:
            torch.testing.assert_close(
                other.keys[layer].dense(8), base.keys[layer].dense(8)[which], atol=1e-5, rtol=1e-5
            )
        for layer in OUTPUT_LAYERS:
            torch.testing.assert_close(other.outputs[layer], base.outputs[layer][which], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist"])
def test_the_pad_token_does_not_matter(family: str) -> None:
    view = MoELayerView(shared_model(family))
    first = capture_facts(view, SEQUENCES, POSITIONS, [2], [2], pad=0)
    second = capture_facts(view, SEQUENCES, POSITIONS, [2], [2], pad=123)
    torch.testing.assert_close(first.keys[2].dense(8), second.keys[2].dense(8), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(first.outputs[2], second.outputs[2], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "modulelist", "qwen3_5_moe"])
def test_early_exit_after_the_last_needed_layer(family: str) -> None:
    model = tiny_model(family)
    calls: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        return lambda *_: calls.__setitem__(name, calls.get(name, 0) + 1)

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(count(f"layer {index}"))
    model.model.norm.register_forward_pre_hook(count("norm"))
    model.lm_head.register_forward_pre_hook(count("head"))
    view = MoELayerView(model)
    capture(view, batch_size=3)
    assert calls == {"layer 0": 3, "layer 1": 3, "layer 2": 3}
    calls.clear()
    capture_facts(view, SEQUENCES, POSITIONS, [1], [0], pad=0)
    assert calls == {"layer 0": 1, "layer 1": 1}
    calls.clear()
    capture_facts(view, SEQUENCES, POSITIONS, [], [0], pad=0)
    assert calls == {"layer 0": 1}


def unusual_state(model: nn.Module) -> None:
    """Training flags, gradients and flags that differ from module to module."""
    model.train()
    model.model.layers[1].eval()
    model.model.layers[2].input_layernorm.eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
    model.model.norm.weight.requires_grad_(True)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)


@pytest.mark.parametrize(("family", "how"), CASES)
def test_the_model_is_as_before(family: str, how: str) -> None:
    model = tiny_model(family, implementation=how)
    unusual_state(model)
    before = state_of(model)
    assert len(set(before["training"].values())) == 2
    capture(MoELayerView(model))
    assert_same_state(before, state_of(model))


class Failure(RuntimeError):
    pass


@pytest.mark.parametrize("site", ["attention", "experts"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist"])
def test_the_model_is_as_before_when_the_forward_fails(family: str, site: str) -> None:
    model = tiny_model(family)
    unusual_state(model)
    layer = model.model.layers[2]
    module = layer.self_attn if site == "attention" else layer.mlp.experts
    if isinstance(module, nn.ModuleList):
        # Expert 5 fails only in the second of the runs that read the gates, when other experts carry hooks.
        module = module[5]
    seen: list[int] = []

    def fail(*_: object) -> None:
        seen.append(1)
        if len(seen) > 1:
            raise Failure

    module.register_forward_pre_hook(fail)
    before = state_of(model)
    with pytest.raises(Failure):
        capture(MoELayerView(model))
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_are_not_finite(family: str) -> None:
    model = tiny_model(family)
    view = MoELayerView(model)
    view.layers[1].experts.read(0).fill_(float("nan"))
    view.layers[1].experts.read(4).fill_(float("inf"))
    with pytest.raises(NumericalError, match="NaN or infinity"):
        capture_facts(view, SEQUENCES, POSITIONS, [2], [], pad=0)
    with pytest.raises(NumericalError, match="Layer 1"):
        capture_facts(view, SEQUENCES, POSITIONS, [], [1], pad=0)
    before = capture_facts(view, SEQUENCES, POSITIONS, [1], [0], pad=0)
    assert torch.isfinite(before.keys[1].key).all()


@pytest.mark.parametrize(
    ("family", "how"), [("qwen3_moe", "eager"), ("gpt_oss", "grouped_mm"), ("modulelist", "eager")]
)
def test_bfloat16(family: str, how: str) -> None:
    model = tiny_model(family, implementation=how, dtype=torch.bfloat16)
    state = capture(MoELayerView(model), batch_size=1)
    for layer, keys in state.keys.items():
        assert (keys.key.dtype, keys.gate.dtype) == (torch.float32, torch.float32)
        for i, (ids, at) in enumerate(zip(SEQUENCES, POSITIONS, strict=True)):
            psi, gates = reference_design(model, ids, at, layer)
            torch.testing.assert_close(gate_matrix(keys)[i], gates, atol=4e-3, rtol=1e-2)
            torch.testing.assert_close(keys.dense(8)[i].reshape(psi.shape), psi, atol=2e-2, rtol=2e-2)
    assert state.outputs[2].dtype == torch.float32


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist"])
def test_models_that_accelerate_dispatched(family: str) -> None:
    """Each module's forward is wrapped, and the embedding lies elsewhere between forwards."""
    accelerate = pytest.importorskip("accelerate")
    wanted = capture(MoELayerView(shared_model(family)))
    model = accelerate.dispatch_model(tiny_model(family), {"": "cpu"}, force_hooks=True)
    accelerate.cpu_offload(model.model.embed_tokens, "cpu")
    assert model.get_input_embeddings().weight.is_meta
    found = capture(MoELayerView(model))
    for layer in KEY_LAYERS:
        torch.testing.assert_close(found.keys[layer].dense(8), wanted.keys[layer].dense(8), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.outputs[2], wanted.outputs[2], atol=1e-6, rtol=1e-5)


def test_positions_outside_their_sequence() -> None:
    view = MoELayerView(shared_model())
    for position in (3, -1):
        with pytest.raises(RequestError, match="outside"):
            capture_facts(view, [[5, 6, 7], [5, 6, 7, 8]], [position, 3], [1], [1], pad=0)


def test_modulelist_gates_where_there_are_more_experts_than_dimensions() -> None:
    model = tiny_model("modulelist")
    moe = MoELayerView(model).layers[1]
    for expert in moe.experts.module:
        for name in ("gate_proj", "up_proj"):
            getattr(expert, name).weight.data = getattr(expert, name).weight.data[:, :5].contiguous()
        expert.down_proj.weight.data = expert.down_proj.weight.data[:5].contiguous()
    block = moe.block
    block.gate = nn.Linear(5, 8, bias=False)
    block.shared_expert = None
    narrow = MoELayerView(model).layers[1]
    assert narrow.experts.layout.d_model == 5
    seen: list[Routing] = []
    hidden = torch.randn(2, 6, 5)
    with hooks() as handles, torch.no_grad():
        handles.append(read_routing(narrow, seen.append))
        block(hidden)
        gate, expert = torch.softmax(block.gate(hidden.reshape(-1, 5)), -1).topk(3, -1)
    wanted = torch.zeros(12, 8).scatter(1, expert, gate / gate.sum(-1, keepdim=True))
    torch.testing.assert_close(
        torch.zeros(12, 8).scatter(1, seen[0].expert, seen[0].gate), wanted, atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3), (torch.float16, 2e-3)])
def test_modulelist_gates_beside_a_loud_shared_expert(dtype: torch.dtype, tolerance: float) -> None:
    model = tiny_model("modulelist", dtype=dtype)
    block = model.model.layers[1].mlp
    block.shared_expert.down_proj.weight.data.mul_(300)
    hidden = torch.randn(1, 20, 32).to(dtype)
    seen: list[Routing] = []
    with hooks() as handles, torch.no_grad():
        handles.append(read_routing(MoELayerView(model).layers[1], seen.append))
        assert 20 < block.shared_expert(hidden).abs().max() < 500
        block(hidden)
        gate, expert = torch.softmax(block.gate(hidden[0]), -1).topk(3, -1)
        gate = gate / gate.sum(-1, keepdim=True)
    wanted = torch.zeros(20, 8).scatter(1, expert, gate.float())
    found = torch.zeros(20, 8).scatter(1, seen[0].expert, seen[0].gate)
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


def test_reading_modulelist_gates_is_unseen_by_other_hooks_of_the_block() -> None:
    model = tiny_model("modulelist")
    moe = MoELayerView(model).layers[1]
    outputs: list[Tensor] = []
    moe.block.register_forward_hook(lambda _, __, out: outputs.append(out))
    seen: list[Routing] = []
    with inference_mode_of(model), hooks() as handles:
        handles.append(read_routing(moe, seen.append))
        handles.append(read_routing(moe, seen.append))
        run(model, collate([SEQUENCES[0]], 0))
    assert len(outputs) == 1
    assert len(seen) == 2
    assert torch.equal(seen[0].gate, seen[1].gate)


class Calls:
    """One experts module called by hand, with its routing read."""

    def __init__(self) -> None:
        self.moe = MoELayerView(shared_model()).layers[1]
        self.hidden = torch.randn(6, 32)
        self.index = torch.tensor([[0, 3, 5]] * 6)
        self.gate = torch.rand(6, 3)

    def read(self, *args: object, **kwargs: object) -> Routing:
        seen: list[Routing] = []
        with hooks() as handles, torch.no_grad():
            handles.append(read_routing(self.moe, seen.append))
            self.moe.experts.module(*args, **kwargs)
        return seen[0]


def test_experts_called_with_keywords_in_any_order() -> None:
    calls = Calls()
    wanted = calls.read(calls.hidden, calls.index, calls.gate)
    assert torch.equal(wanted.expert, calls.index)
    for routing in (
        calls.read(calls.hidden, top_k_weights=calls.gate, top_k_index=calls.index),
        calls.read(top_k_weights=calls.gate, hidden_states=calls.hidden, top_k_index=calls.index),
    ):
        assert torch.equal(routing.hidden, wanted.hidden)
        assert torch.equal(routing.expert, wanted.expert)
        assert torch.equal(routing.gate, wanted.gate)


def test_index_and_gate_with_the_batch_as_an_axis_of_their_own() -> None:
    calls = Calls()
    seen: list[Routing] = []
    handle = read_routing(calls.moe, seen.append)
    shaped = [t.reshape(2, 3, -1) for t in (calls.hidden, calls.index.int(), calls.gate)]
    for hook in calls.moe.experts.module._forward_pre_hooks.values():
        hook(calls.moe.experts.module, tuple(shaped), {})
    handle.remove()
    assert torch.equal(seen[0].hidden, calls.hidden)
    assert torch.equal(seen[0].expert, calls.index)
    assert seen[0].expert.dtype == torch.int64
    assert torch.equal(seen[0].gate, calls.gate)


def test_experts_called_in_another_way_are_refused() -> None:
    calls = Calls()
    hidden, index, gate = calls.hidden, calls.index, calls.gate
    for arguments in [(hidden,), (hidden, index), (hidden, gate, index), (hidden, index, None), (hidden, [0], gate)]:
        with pytest.raises(LayoutError, match="protocol is unknown"):
            calls.read(*arguments)
    with pytest.raises(LayoutError, match=r"\(6, 3\).*\(6, 8\)"):
        calls.read(hidden, index, torch.rand(6, 8))
    with pytest.raises(LayoutError, match="expert 8, but it holds only 8"):
        calls.read(hidden, index + 3, gate)
    assert not calls.moe.experts.module._forward_pre_hooks


def test_stop_after_ends_run_quietly_and_other_errors_pass() -> None:
    model = shared_model()
    with hooks() as handles, torch.no_grad():
        handles.append(stop_after(model.model.layers[0]))
        run(model, collate([[5, 6]], 0))
    with pytest.raises(IndexError):
        run(model, collate([[5, 10**6]], 0))


def test_frozen_parameters() -> None:
    model = tiny_model()
    unusual_state(model)
    before = state_of(model)

    def use() -> None:
        with frozen_parameters(model):
            assert not any(p.requires_grad for p in model.parameters())
            raise Failure

    with pytest.raises(Failure):
        use()
    assert_same_state(before, state_of(model))


def test_inference_mode_of() -> None:
    model = tiny_model()
    unusual_state(model)
    before = state_of(model)

    def use() -> None:
        with inference_mode_of(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            raise Failure

    with pytest.raises(Failure):
        use()
    assert torch.is_grad_enabled()
    assert_same_state(before, state_of(model))


# ---------------------------------------------------------------- starting above layers that did not change


@pytest.mark.parametrize("family", FAMILIES)
def test_a_capture_from_kept_inputs_is_a_whole_one(family: str) -> None:
    model = tiny_model(family)
    view = MoELayerView(model)
    calls: list[int] = []
    for index, layer in enumerate(view.decoder_layers):
        norm = next(m for n, m in layer.named_modules() if n.endswith("layernorm"))
        norm.register_forward_hook(lambda *_, i=index: calls.append(i))
    inputs = LayerInputs([1, 2])

    def facts(**options: object) -> FactStates:
        return capture_facts(view, SEQUENCES, POSITIONS, [2], [2], 0, 3, **options)

    facts(inputs=inputs)
    for start in (1, 2):
        with torch.no_grad():
            for expert in range(3):
                view.layers[start].experts.read(expert).mul_(1.5)
        whole = facts()
        calls.clear()
        part = facts(inputs=inputs, start=start)
        assert set(calls) == set(range(start, 3))
        assert torch.equal(part.outputs[2], whole.outputs[2])
        for name in ("expert", "gate", "key"):
            assert torch.equal(getattr(part.keys[2], name), getattr(whole.keys[2], name))


def test_a_capture_from_the_first_layer_needs_no_inputs() -> None:
    view = MoELayerView(shared_model())
    whole = capture_facts(view, SEQUENCES, POSITIONS, [0], [1], 0)
    again = capture_facts(view, SEQUENCES, POSITIONS, [0], [1], 0, inputs=LayerInputs([0, 1]), start=0)
    assert torch.equal(whole.outputs[1], again.outputs[1])


# ---------------------------------------------------------------- experts that leave tokens out


@pytest.mark.parametrize(("family", "how"), [*CASES, ("nemotron_h", "eager")])
def test_experts_on_some_tokens(family: str, how: str) -> None:
    moe = next(iter(MoELayerView(tiny_model(family, implementation=how)).layers.values()))
    if moe.experts.layout.storage == "modulelist":
        assert experts_on_some(moe, 6, torch.tensor([1])) == []
        return
    module = moe.experts.module
    names = list(inspect.signature(type(module).forward).parameters)[1:4]
    expert = torch.rand(6, 8).topk(3).indices
    arguments = (torch.randn(6, moe.experts.layout.d_model), expert, torch.rand(6, 3))
    rows, calls = torch.tensor([1, 4, 5]), []
    with torch.no_grad():
        whole = module(*arguments)
        with hooks() as handles:
            handles += experts_on_some(moe, 6, rows)
            handles.append(read_routing(moe, lambda routing: calls.append(routing.hidden)))
            by_place = module(*arguments)
            by_name = by_place
            if how == "eager":
                by_name = module(arguments[0], **dict(zip(names[1:], arguments[1:], strict=True)))
            others = module(*(a[:5] for a in arguments))
        assert torch.equal(module(*arguments), whole)
    assert torch.equal(calls[0], arguments[0][rows])
    for found in (by_place, by_name):
        torch.testing.assert_close(found[rows], whole[rows], atol=1e-5, rtol=1e-5)
        assert torch.equal(found[[0, 2, 3]], torch.zeros_like(found[[0, 2, 3]]))
    torch.testing.assert_close(others, whole[:5], atol=1e-5, rtol=1e-5)
    assert experts_on_some(moe, 6, torch.arange(6)) == []
