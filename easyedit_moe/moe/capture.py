"""Scoped capture of routing, keys and layer outputs, with an early exit after the last layer that is needed.

Index and gate are what the router really handed to the experts; nothing is recomputed. Old ModuleList experts show
neither to a hook, so there the block is run once more on the same tokens with its experts replaced by unit vectors,
and the gates are read off its output.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from easyedit_moe.algebra.routed_keys import RoutedKeys
from easyedit_moe.errors import LayoutError, RequestError, not_finite
from easyedit_moe.facts.tokens import Batch, collate
from easyedit_moe.interrupts import do_all
from easyedit_moe.moe.embeddings import input_embeddings
from easyedit_moe.moe.experts import ModuleListExperts
from easyedit_moe.moe.ffn_experts import FFNExpert
from easyedit_moe.moe.holding import intact
from easyedit_moe.moe.layer_outputs import LayerOutput, layer_output
from easyedit_moe.moe.layers import MoELayer, MoELayerView
from easyedit_moe.moe.other_experts import ParallelExperts, SortedInputExperts

STUMBLES = (AttributeError, IndexError, KeyError, TypeError, ValueError)
"""What a model raises whose layers need more of one another than hidden states, where some of them are skipped."""


class _StopForward(Exception):
    """Ends a forward after the last needed layer; never leaves this module."""


@dataclass(frozen=True)
class Routing:
    """What the experts of one layer were called with: ``hidden [N, d]``, ``expert [N, K]``, ``gate [N, K]``.

    Where a token's experts get different inputs, because gates are applied to these, ``hidden`` is ``[N, K, d]``. Slots
    that no expert with weights fills have gate 0.
    """

    hidden: Tensor
    expert: Tensor
    gate: Tensor

    def inputs(self, token: Tensor, slot: Tensor) -> Tensor:
        """``[S, d]``, what the expert of each of these slots got."""
        return self.hidden[token] if self.hidden.dim() == 2 else self.hidden[token, slot]


@dataclass(frozen=True)
class FactStates:
    """State of T fact tokens: routed keys per layer (float32) and layer outputs ``[T, d]`` per layer (float32)."""

    keys: dict[int, RoutedKeys]
    outputs: dict[int, Tensor]


@contextmanager
def inference_mode_of(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every submodule's training flag is as before."""
    with intact(model):
        modes = [(module, module.training) for module in model.modules()]
        try:
            model.eval()
            with torch.no_grad():
                yield
        finally:
            do_all(partial(setattr, module, "training", training) for module, training in modes)


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside; afterwards each flag and each ``.grad`` is as before."""
    with intact(model):
        flags = [(p, p.requires_grad) for p in model.parameters()]
        try:
            for p, _ in flags:
                p.requires_grad_(False)
            yield
        finally:
            do_all(partial(p.requires_grad_, flag) for p, flag in flags)


@contextmanager
def hooks() -> Iterator[list[Any]]:
    """A list for hook handles, all removed at the end, whatever happens."""
    handles: list[Any] = []
    try:
        yield handles
    finally:
        do_all(handle.remove for handle in handles)


def model_device(model: nn.Module) -> torch.device:
    """Device of the token embedding, where inputs go; the CPU if accelerate brings the embedding in from elsewhere."""
    device = input_embeddings(model).weight.device
    return torch.device("cpu") if device.type == "meta" else device


def run(model: nn.Module, batch: Batch) -> None:
    """A forward whose result is not needed; an early exit counts as done."""
    device = model_device(model)
    with suppress(_StopForward):
        model(input_ids=batch.ids.to(device), attention_mask=batch.mask.to(device), use_cache=False)


def stop_after(layer: nn.Module) -> Any:
    """Hook handle that ends the forward after ``layer``. Register it after the hooks that read this layer."""

    def stop(*_: Any) -> None:
        raise _StopForward

    return layer.register_forward_hook(stop)


def read_routing(moe: MoELayer, receive: Callable[[Routing], None]) -> Any:
    """Hook handle that hands each forward's `Routing` of this layer to ``receive``."""
    if isinstance(moe.experts, ModuleListExperts):
        return _read_modulelist_routing(moe, receive)
    if isinstance(moe.experts, ParallelExperts):
        return _read_router(moe, moe.experts, receive)
    if isinstance(moe.experts, FFNExpert):
        return _read_ffn_routing(moe, receive)
    if isinstance(moe.experts, SortedInputExperts):
        return moe.experts.module.register_forward_pre_hook(
            lambda _, args, kwargs: receive(_routing_by_inputs(moe, (*args, *kwargs.values())[0])), with_kwargs=True
        )
    names = list(inspect.signature(moe.experts.module.forward).parameters)

    def read(module: nn.Module, args: tuple, kwargs: dict) -> None:
        values = dict(zip(names, args, strict=False)) | kwargs
        ordered = [values[n] for n in names if n in values][:3]
        receive(_checked_routing(moe, ordered))

    return moe.experts.module.register_forward_pre_hook(read, with_kwargs=True)


def experts_on_some(moe: MoELayer, tokens: int, rows: Tensor) -> list[Any]:
    """Hook handles under which packed experts compute only ``rows`` of their ``tokens`` inputs, and answer 0 elsewhere.

    For tokens whose output nobody reads, such as padding. Where the experts are called otherwise (old ModuleLists, or
    another number of inputs), nothing changes.
    """
    if moe.experts.sum_in_block or len(rows) == tokens:
        return []
    names = list(inspect.signature(moe.experts.module.forward).parameters)
    pending: list[bool] = []

    def pick(module: nn.Module, args: tuple, kwargs: dict) -> Any:
        given = [*args, *(kwargs[n] for n in names[len(args) :] if n in kwargs)][:3]
        fits = all(isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] == tokens for value in given)
        pending.append(fits)
        if not fits:
            return None
        few = [value[rows.to(value.device)] for value in given]
        fewer = {n: few.pop() for n in reversed(names[len(args) : 3]) if n in kwargs}
        return (*few, *args[3:]), kwargs | fewer

    def widen(module: nn.Module, args: tuple, output: Any) -> Any:
        if not pending.pop():
            return None
        return output.new_zeros(tokens, output.shape[-1]).index_copy(0, rows.to(output.device), output)

    module = moe.experts.module
    return [module.register_forward_pre_hook(pick, with_kwargs=True), module.register_forward_hook(widen)]


def _checked_routing(moe: MoELayer, arguments: Sequence[Any]) -> Routing:
    """The first three arguments of an experts module as `Routing`; LayoutError if they are anything else."""
    called = f"{moe.experts_name} was not called as experts(hidden, index, weights)"
    if len(arguments) < 3 or not all(isinstance(a, Tensor) for a in arguments):
        raise LayoutError(f"{called}; this protocol is unknown.")
    hidden, expert, gate = arguments
    if expert.is_floating_point() or not gate.is_floating_point() or expert.shape != gate.shape:
        raise LayoutError(
            f"{called} with one weight per index: index is {expert.dtype} {tuple(expert.shape)}, weights are "
            f"{gate.dtype} {tuple(gate.shape)}; this protocol is unknown."
        )
    experts = moe.experts.layout.num_experts
    if moe.experts.without_weights:
        weightless = (expert >= experts) & (expert < experts + moe.experts.without_weights)
        expert, gate = expert.masked_fill(weightless, 0), gate.masked_fill(weightless, 0)
    if expert.numel() and int(expert.max()) >= experts:
        raise LayoutError(
            f"{moe.experts_name} was handed expert {int(expert.max())}, but it holds only "
            f"{moe.experts.layout.num_experts}. Expert parallelism and experts without weights are not supported: load "
            "the model without a distributed plan."
        )
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return Routing(hidden, expert.reshape(len(hidden), -1).long(), gate.reshape(len(hidden), -1))


def _routing_by_inputs(moe: MoELayer, inputs: Tensor) -> Routing:
    """Routing of experts that get every token once, times its gate: an input of zeros was not routed."""
    spread = inputs.reshape(moe.experts.layout.num_experts, -1, inputs.shape[-1]).transpose(0, 1)
    routed = (spread != 0).any(-1)
    top = max(int(routed.sum(1).max()), 1)
    gate, expert = routed.to(inputs.dtype).topk(top, dim=1)
    return Routing(spread.gather(1, expert[..., None].expand(-1, -1, inputs.shape[-1])), expert, gate)


def _read_router(moe: MoELayer, experts: ParallelExperts, receive: Callable[[Routing], None]) -> Any:
    """Routing of parallel linears; their router returns tokens and gates sorted by expert, and each expert's count."""

    def read(module: nn.Module, args: tuple, output: Any) -> None:
        if experts.silenced:
            return
        _, token, gate, sizes, _ = output
        hidden = args[0]
        order = torch.argsort(token, stable=True)
        expert = torch.repeat_interleave(
            torch.arange(len(sizes), device=token.device), torch.as_tensor(sizes, device=token.device)
        )
        receive(Routing(hidden, expert[order].reshape(len(hidden), -1), gate[order].reshape(len(hidden), -1)))

    return cast(nn.Module, experts.block.router).register_forward_hook(read)


def _read_modulelist_routing(moe: MoELayer, receive: Callable[[Routing], None]) -> Any:
    def read(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        receive(_routing_by_unit_vectors(moe, args, kwargs))

    return moe.block.register_forward_hook(read, with_kwargs=True)


def _read_ffn_routing(moe: MoELayer, receive: Callable[[Routing], None]) -> Any:
    """Routing of an FFN, which is the one expert of every token; its gate is 1 unless a MoE block says otherwise."""
    if not moe.experts.sum_in_block:
        return moe.experts.module.register_forward_pre_hook(
            lambda _, args, kwargs: receive(_one_expert((*args, *kwargs.values())[0])), with_kwargs=True
        )
    return moe.block.register_forward_hook(
        lambda _, args, kwargs, output: receive(_routing_of_shared(moe, args, kwargs, output)), with_kwargs=True
    )


def _one_expert(hidden: Tensor, gate: Tensor | None = None) -> Routing:
    flat = hidden.reshape(-1, hidden.shape[-1])
    gate = flat.new_ones(len(flat)) if gate is None else gate
    return Routing(flat, torch.zeros(len(flat), 1, dtype=torch.long, device=flat.device), gate[:, None])


def _routing_of_shared(moe: MoELayer, args: tuple, kwargs: dict, output: Any) -> Routing:
    """Routing of a shared expert: what its block multiplies a first coordinate with that is far larger than its own."""
    inputs: list[Tensor] = []
    own: list[Tensor] = []

    def read(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        inputs.append((*args, *kwargs.values())[0])
        own.append(output.reshape(-1, output.shape[-1])[:, 0].float())  # the block may add to the output in place

    whole = layer_output(output)
    scale = _unit_scale(whole.dtype)
    with torch.no_grad(), hooks() as handles:
        handles.append(moe.experts.module.register_forward_hook(read, with_kwargs=True))
        answered = block_output(moe, args, kwargs, {0: (0, scale)})[:, 0].float()
    before = whole.reshape(-1, whole.shape[-1])[:, 0].float()
    return _one_expert(inputs[0], (answered - before) / (scale - own[0]))


def _unit_scale(dtype: torch.dtype) -> float:
    """A number far larger than hidden states, exact in a dtype."""
    return 2.0**10 if dtype == torch.float16 else 2.0**20


def _routing_by_unit_vectors(moe: MoELayer, args: tuple, kwargs: dict) -> Routing:
    """Gates of ModuleList experts: expert j answers with a scaled unit vector, so output coordinate j is its gate."""
    hidden = args[0] if args else kwargs["hidden_states"]
    experts, flat = moe.experts.layout.num_experts, hidden.reshape(-1, hidden.shape[-1])
    scale = _unit_scale(hidden.dtype)
    gates = flat.new_zeros(len(flat), experts, dtype=torch.float32)
    width = moe.experts.layout.d_model
    with torch.no_grad():
        base = block_output(moe, args, kwargs, {})
        for start in range(0, experts, width):
            chunk = range(start, min(start + width, experts))
            out = block_output(moe, args, kwargs, {j: (j - start, scale) for j in chunk})
            gates[:, chunk.start : chunk.stop] = ((out - base).float() / scale)[:, : len(chunk)]
    top = int((gates != 0).sum(1).max())
    gate, expert = gates.topk(max(top, 1), dim=1)
    return Routing(flat, expert, gate)


def block_output(moe: MoELayer, args: tuple, kwargs: dict, unit: dict[int, tuple[int, float]]) -> Tensor:
    """Output ``[N, d]`` of a block called anew whose output the experts' sum is a part of, its experts replaced.

    Expert j answers ``scale * e_coordinate`` where ``unit[j]`` is ``(coordinate, scale)`` (modules only), and zero if
    it is not in ``unit``.
    """

    def answer(j: int) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            out = torch.zeros_like(output)
            if j in unit:
                coordinate, scale = unit[j]
                out[..., coordinate] = scale
            return out

        return hook

    if isinstance(moe.experts, ParallelExperts):
        with moe.experts.silent():
            output = layer_output(moe.block.forward(*args, **kwargs))
        return output.reshape(-1, output.shape[-1])
    single = isinstance(moe.experts, FFNExpert)
    modules = [moe.experts.module] if single else cast(nn.ModuleList, moe.experts.module)
    with hooks() as handles:
        for j, expert in enumerate(modules):
            handles.append(expert.register_forward_hook(answer(j)))
        # Not through __call__: the extra run must stay unseen by the hooks of the block, which count its outputs.
        output = layer_output(moe.block.forward(*args, **kwargs))
    return output.reshape(-1, output.shape[-1])


def routed_keys(moe: MoELayer, routing: Routing, rows: Tensor) -> RoutedKeys:
    """`RoutedKeys` in float32 of the tokens ``rows`` of one layer's routing."""
    expert = routing.expert[rows]
    slots = torch.arange(expert.shape[1], device=expert.device).repeat(len(expert))
    spread = routing.inputs(rows.to(expert.device).repeat_interleave(expert.shape[1]), slots)
    keys = moe.experts.keys(spread, expert.reshape(-1)).reshape(*expert.shape, -1)
    return RoutedKeys(expert, routing.gate[rows].float(), keys.float())


@contextmanager
def replaced_methods(methods: Mapping[nn.Module, Callable[..., Any]], name: str = "forward") -> Iterator[None]:
    """Inside, these modules compute by other functions; afterwards by their own again, or what stood in before."""
    saved = [(module, module.__dict__.get(name)) for module in methods]
    try:
        for module, method in methods.items():
            setattr(module, name, method)
        yield
    finally:
        do_all(partial(_put_back_method, module, name, method) for module, method in saved)


def _put_back_method(module: nn.Module, name: str, method: Any) -> None:
    if method is not None:
        setattr(module, name, method)
    else:
        module.__dict__.pop(name, None)


@contextmanager
def skipping_layers(view: MoELayerView, layer: int, answer: LayerOutput) -> Iterator[None]:
    """Inside, layers below ``layer`` pass their input on and ``layer`` answers ``answer``, without computing."""

    def passing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return answer.pass_on(hidden_states)

    def answering(*args: Any, **kwargs: Any) -> Any:
        return answer.put_back(answer.hidden)

    below = dict.fromkeys(view.decoder_layers[:layer], passing)
    with replaced_methods({**below, view.decoder_layers[layer]: answering}):
        yield


class LayerInputs:
    """Inputs of some decoder layers for every batch of a capture, so that a later capture can start there.

    Exact where layers hand on nothing but hidden states; see `easyedit_moe.moe.probe.starts_anywhere`.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = [layer for layer in layers if layer > 0]
        self._kept: dict[tuple[int, int], LayerOutput] = {}

    def keep(self, view: MoELayerView, batch: int, handles: list[Any]) -> None:
        """Register hooks that keep what the layers before ours put out in the forward of this batch."""

        def keeper(layer: int) -> Callable[..., None]:
            def read(module: nn.Module, args: tuple, output: Any) -> None:
                self._kept[batch, layer] = LayerOutput.of(output)

            return read

        for layer in self.layers:
            handles.append(view.decoder_layers[layer - 1].register_forward_hook(keeper(layer)))

    def starting_at(self, view: MoELayerView, layer: int, batch: int) -> Any:
        """A context in which the layers below ``layer`` do not run; nothing is spared where no input was kept."""
        kept = self._kept.get((batch, layer))
        return nullcontext() if kept is None else skipping_layers(view, layer - 1, kept)


def capture_facts(
    view: MoELayerView,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[int],
    key_layers: Sequence[int],
    output_layers: Sequence[int],
    pad: int,
    batch_size: int = 64,
    inputs: LayerInputs | None = None,
    start: int | None = None,
) -> FactStates:
    """Routed keys and layer outputs at one position of each token sequence.

    The forward stops after the last layer named. Batches are formed by length, so results do not depend on the
    tokenizer's padding side, nor on the order of the sequences.

    Args:
        view: of the model, whose weights are as they are now.
        sequences: token ids, without padding.
        positions: per sequence, the index of its fact token.
        key_layers: MoE layers whose routed keys are wanted.
        output_layers: layers whose outputs are wanted.
        pad: token id to pad with.
        batch_size: sequences in one forward.
        inputs: keeps the inputs of its layers; filled by an earlier call with the same sequences, it also spares the
            layers below ``start``.
        start: first layer to run; the layers below must not have changed since ``inputs`` were kept.

    Raises:
        RequestError: a position outside its sequence. LayoutError: experts that are called in an unknown way.
        NumericalError: a key or an output that is not finite.
    """
    outside = [i for i, ids in enumerate(sequences) if not 0 <= positions[i] < len(ids)]
    if outside:
        raise RequestError(f"Positions {[positions[i] for i in outside]} lie outside their sequences {outside}.")
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    parts: list[FactStates] = []
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        batch = collate([sequences[i] for i in chosen], pad)
        where = torch.tensor([positions[i] for i in chosen])
        with intact(view.model), hooks() as handles, ExitStack() as stack:
            if inputs is not None and start is not None:
                stack.enter_context(inputs.starting_at(view, start, len(parts)))
            if inputs is not None:
                inputs.keep(view, len(parts), handles)
            parts.append(_capture_batch(view, batch, where, key_layers, output_layers))
    back = torch.tensor(sorted(range(len(order)), key=order.__getitem__))
    keys = {layer: _rows(RoutedKeys.cat([p.keys[layer] for p in parts]), back) for layer in key_layers}
    outputs = {}
    for layer in output_layers:
        stacked = torch.cat([p.outputs[layer] for p in parts])
        outputs[layer] = stacked[back.to(stacked.device)]
    for layer, value in [*outputs.items(), *((layer, k.key) for layer, k in keys.items())]:
        if not torch.isfinite(value).all():
            raise not_finite(f"Layer {layer} yields NaN or infinity at a fact token")
    return FactStates(keys, outputs)


def _rows(keys: RoutedKeys, index: Tensor) -> RoutedKeys:
    index = index.to(keys.key.device)
    return RoutedKeys(keys.expert[index], keys.gate[index], keys.key[index])


def _capture_batch(
    view: MoELayerView, batch: Batch, where: Tensor, key_layers: Sequence[int], output_layers: Sequence[int]
) -> FactStates:
    width = batch.ids.shape[1]
    keys: dict[int, RoutedKeys] = {}
    outputs: dict[int, Tensor] = {}
    flat = torch.arange(len(where)) * width + where

    def receive_routing(moe: MoELayer) -> Callable[[Routing], None]:
        def receive(routing: Routing) -> None:
            keys[moe.index] = routed_keys(moe, routing, flat.to(routing.hidden.device))

        return receive

    def receive_output(index: int) -> Callable[..., None]:
        def receive(module: nn.Module, args: tuple, output: Any) -> None:
            hidden = layer_output(output)
            at = where.to(hidden.device)
            outputs[index] = hidden[torch.arange(len(at), device=hidden.device), at].float()

        return receive

    with inference_mode_of(view.model), hooks() as handles:
        for index in key_layers:
            handles.append(read_routing(view.layers[index], receive_routing(view.layers[index])))
        for index in output_layers:
            handles.append(view.decoder_layers[index].register_forward_hook(receive_output(index)))
        handles.append(stop_after(view.decoder_layers[max([*key_layers, *output_layers])]))
        run(view.model, batch)
    return FactStates(keys, outputs)
