"""Checks that are measured on the model itself, once, before anything is edited."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from easyedit_moe.errors import LayoutError, not_finite
from easyedit_moe.facts.tokens import collate
from easyedit_moe.moe.capture import (
    STUMBLES,
    LayerInputs,
    Routing,
    block_output,
    capture_facts,
    hooks,
    inference_mode_of,
    read_routing,
    routed_keys,
    run,
    stop_after,
)
from easyedit_moe.moe.layer_outputs import layer_output
from easyedit_moe.moe.layers import MoELayer, MoELayerView
from easyedit_moe.moe.tails import FactPlaces, IdentityTail, LocalTail, ScaleTail, Tail, pulled_back, recorded_tail

_KEY_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_TRAIN = "MoE-FT, MoE-LoRA and MEMoE, which train, need no such thing."
_FARTHEST = 4
"""Tokens over which something behind the experts may spread; short convolutions are up to 5 wide."""


def expert_sum(moe: MoELayer, routing: Routing) -> Tensor:
    """``sum_j g_j (W_j k_j + b_j)`` of every token, ``[N, d]`` float32, from this package's keys and weights."""
    keys = routed_keys(moe, routing, torch.arange(len(routing.hidden), device=routing.hidden.device))
    out = torch.zeros(keys.num_tokens, moe.experts.layout.d_model, device=keys.key.device)
    for block in keys.design(torch.float32):
        out.index_add_(0, block.rows, (moe.experts.read(block.expert).float() @ block.z).T)
    if moe.experts.layout.biased:
        biases = [cast(Tensor, moe.experts.expert_bias(j)) for j in range(moe.experts.layout.num_experts)]
        bias = torch.stack([b.detach().float() for b in biases])
        out += (keys.gate[..., None] * bias[keys.expert]).sum(1)
    return out


def check_keys(view: MoELayerView, index: int, ids: Sequence[int], pad: int) -> float:
    """Relative distance between `expert_sum` and what the experts module itself returns on ``ids``.

    Where no module returns that sum (ModuleList experts), it is what the block's output loses without them, and the
    distance is relative to the block's output.

    Raises:
        LayoutError: they differ, so this layer's layout is not what its flags say.
        NumericalError: the experts' output is not finite.
    """
    moe = view.layers[index]
    if moe.experts.nonlinear:
        raise LayoutError(moe.experts.nonlinear)
    seen: list[Tensor] = []
    with inference_mode_of(view.model), hooks() as handles:
        handles.append(read_routing(moe, lambda routing: seen.append(expert_sum(moe, routing))))
        handles.append(_read_expert_output(moe, lambda *outputs: seen.extend(outputs)))
        handles.append(stop_after(moe.layer))
        run(view.model, collate([ids], pad))
    ours = seen[0]
    theirs, whole = (out.reshape(ours.shape).float() for out in seen[1:])
    if not torch.isfinite(theirs).all():
        raise not_finite(f"{moe.experts_name} returns NaN or infinity")
    error = float((ours - theirs).norm() / whole.norm().clamp_min(1e-30))
    if not error <= _KEY_TOLERANCE[moe.experts.layout.dtype]:
        raise LayoutError(
            f"{moe.experts_name} ({type(moe.experts.module).__name__}): the sum of gated expert outputs differs from "
            f"the module's own output by {error:.1e}. Its layout is not what it looks like; please report the model's "
            "class."
        )
    return error


def _read_expert_output(moe: MoELayer, receive: Callable[[Tensor, Tensor], None]) -> Any:
    """Hook handle that hands over the experts' own sum, and the output that it was read from."""
    if not moe.experts.sum_in_block:
        return moe.experts.module.register_forward_hook(
            lambda _, args, kwargs, out: receive(moe.experts.own_sum(out, args, kwargs), moe.experts.sum_of(out)),
            with_kwargs=True,
        )

    def read(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        whole = layer_output(output)
        rest = block_output(moe, args, kwargs, {})
        receive(whole.reshape(rest.shape) - rest, whole)

    return moe.block.register_forward_hook(read, with_kwargs=True)


def measured_tail(view: MoELayerView, index: int, ids: Sequence[int], pad: int) -> Tail:
    """How a change of the experts' sum moves the layer's output.

    Measured, not read from a config: the sum is shifted by a fixed direction and the layer's output compared. The
    shift is put where the experts' sum appears, because some blocks scale it before they add a shared expert; for
    ModuleList experts, whose gates hold such a factor already, that is the block's output.

    Raises:
        LayoutError: the layer's output does not follow its experts at all, or follows those of other tokens.
        NumericalError: the layer's output is not finite.
    """
    moe = view.layers[index]
    tokens = torch.arange(len(ids))
    states: list[Tensor] = []
    sums: list[Tensor] = []
    shift: list[Tensor] = []

    def move(module: nn.Module, args: tuple, output: Any) -> Any:
        sums.append(moe.experts.sum_of(output).detach().float())
        return moe.experts.shifted_sum(output, tokens, shift[0].expand(len(ids), -1)) if shift else None

    def read(module: nn.Module, args: tuple, output: Any) -> None:
        states.append(layer_output(output).detach().float())

    with inference_mode_of(view.model), hooks() as handles:
        handles.append(moe.sum_site.register_forward_hook(move))
        handles.append(moe.layer.register_forward_hook(read))
        handles.append(stop_after(moe.layer))
        batch = collate([ids], pad)
        run(view.model, batch)
        scale = sums[0].abs().max().clamp_min(states[0].abs().max()).clamp_min(1e-6)
        direction = torch.cos(torch.arange(moe.experts.layout.d_model, dtype=torch.float32)).to(sums[0].device)
        shift.append(direction * scale)
        run(view.model, batch)
    if not (torch.isfinite(states[0]).all() and torch.isfinite(states[1]).all()):
        raise not_finite(f"{moe.name} returns NaN or infinity")
    if states[0].shape[-1] == len(direction):
        moved = (states[1] - states[0]).reshape(-1, len(direction))
        wanted = shift[0].to(moved.device)
        gain = float((moved @ wanted).mean() / (wanted @ wanted))
        error = float((moved - gain * wanted).norm() / (moved.norm() + 1e-30))
        if abs(gain) >= 1e-6 and error <= 0.05:
            return IdentityTail() if abs(gain - 1) < 0.01 else ScaleTail(gain)
    return _checked_local_tail(view, index, FactPlaces(view, [ids], [len(ids) // 3], pad))


def _checked_local_tail(view: MoELayerView, index: int, places: FactPlaces) -> LocalTail:
    """LayoutError unless a change of one token's experts moves that token and few others, and can be pulled back."""
    moe, at = view.layers[index], places.positions[0]
    with recorded_tail(view, index, places) as tail:
        nothing = torch.zeros(1, tail.width, device=tail.device)
        plain = tail.outputs(nothing)[0]
        direction = torch.cos(torch.arange(tail.width, dtype=torch.float32, device=tail.device))[None]
        step = 0.01 * moe.experts.sum_of(tail.recorded_sum).float().norm(dim=1).mean() / direction.norm()
        moved = tail.outputs(direction * step.clamp_min(1e-6).to(tail.device))[0] - plain
    sizes = moved.norm(dim=1)
    here, touched = float(sizes[at]), torch.nonzero(sizes > 1e-5 * sizes[at]).flatten().tolist()
    if here <= 1e-6 * float(plain[at].norm()):
        raise LayoutError(
            f"{moe.name}: its output does not follow its experts' output (it moved by {here:.1e}), so a residual at "
            f"the layer's output can't be handed to the experts. {_TRAIN}"
        )
    reach = touched[-1] - at
    if touched[0] < at or reach > _FARTHEST:
        raise LayoutError(
            f"{moe.name}: what its experts return for token {at} of {len(sizes)} also moves the layer's output at "
            f"tokens {touched[0]} to {touched[-1]}, so a residual at the fact token can't be handed to its experts. "
            f"{_TRAIN}"
        )
    found = pulled_back(index, moved[at : at + 1], places).reached.to(moved.device)
    share = float((found * moved[at]).sum() / moved[at].square().sum())
    if not abs(share - 1) < 0.1:
        raise LayoutError(
            f"{moe.name}: of a change that its experts can bring about, pulling it back through the layer finds only "
            f"a share of {share:.2f}, so a residual at the layer's output can't be handed to the experts. "
            f"{_TRAIN}"
        )
    return LocalTail(reach)


def starts_anywhere(view: MoELayerView, layers: Sequence[int], ids: Sequence[int], pad: int) -> bool:
    """Whether a forward that starts at any of ``layers`` from its kept input ends as one from the first layer does."""
    last = layers[-1]
    inputs = LayerInputs(layers)
    whole = capture_facts(view, [ids], [len(ids) - 1], [], [last], pad, inputs=inputs).outputs[last]
    for layer in layers:
        try:
            part = capture_facts(view, [ids], [len(ids) - 1], [], [last], pad, inputs=inputs, start=layer).outputs[last]
        except STUMBLES:
            return False
        if not bool((part - whole).abs().max() <= 1e-6 * whole.abs().max()):
            return False
    return True
