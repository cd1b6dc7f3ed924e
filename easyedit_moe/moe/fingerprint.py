"""What tells one model from another: with edits left out, and with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from easyedit_moe.errors import DenseModelError
from easyedit_moe.moe.experts import expert_matrix
from easyedit_moe.moe.layers import MoELayer, MoELayerView
from easyedit_moe.moe.wrappers import own_parameters, plain_model, plain_name
from easyedit_moe.storage.checksums import checksums, checksums_of

_SAMPLES_PER_PARAMETER = 1024


def model_fingerprint(
    view: MoELayerView, without: Iterable[str] = (), instead: Mapping[nn.Parameter, Tensor] | None = None
) -> str:
    """SHA-256 over class, shapes, dtypes and a strided sample of every parameter except the down-projections.

    What an edit writes is left out, so that the fingerprint is that of the unedited model before and after it; where
    that is more than down-projections, ``without`` names the other parameters, or ``instead`` has what they held.
    """
    return _fingerprint(view, type(view.model), view.model.named_parameters(), without, instead or {})


def unedited_fingerprint(model: nn.Module) -> str:
    """The `model_fingerprint` of a model, or, of a dense one, the same over every parameter."""
    try:
        return model_fingerprint(MoELayerView(model))
    except DenseModelError:
        return _told(type(model), model.named_parameters(), set(), {})


def _edited(view: MoELayerView) -> set[nn.Parameter]:
    return {parameter for moe in view.layers.values() for _, parameter in moe.experts.parameters()}


def plain_fingerprint(view: MoELayerView, without: Iterable[str] = ()) -> str:
    """The `model_fingerprint` of the model without the adapters and wrappers around it; ``without`` are plain names."""
    names: dict[nn.Parameter, str] = {}
    for name, parameter in own_parameters(view.model).items():
        names.setdefault(parameter, name)
    own = ((name, parameter) for parameter, name in names.items())
    return _fingerprint(view, type(plain_model(view.model)), own, without, {})


def _fingerprint(
    view: MoELayerView,
    kind: type,
    parameters: Iterable[tuple[str, nn.Parameter]],
    without: Iterable[str],
    instead: Mapping[nn.Parameter, Tensor],
) -> str:
    skip = _edited(view)
    own = own_parameters(view.model)  # under every name that a shared parameter has
    skip |= {own[name] for name in map(plain_name, without) if name in own}
    return _told(kind, parameters, skip, instead)


def _told(
    kind: type,
    parameters: Iterable[tuple[str, nn.Parameter]],
    skip: set[nn.Parameter],
    instead: Mapping[nn.Parameter, Tensor],
) -> str:
    told = [(f"{name}{tuple(p.shape)}{p.dtype}".encode(), p, p in skip or p.is_meta) for name, p in parameters]
    samples = _samples([instead.get(p, p) for _, p, left_out in told if not left_out])
    state = hashlib.sha256(kind.__name__.encode())
    for text, _, left_out in told:
        state.update(text)
        if not left_out:
            state.update(next(samples))
    return state.hexdigest()


def _samples(weights: Sequence[Tensor]) -> Iterator[bytes]:
    """A strided sample of each, as float32; read from every device at once, since each read waits for it."""
    flat = [weight.detach().reshape(-1) for weight in weights]
    some = [one[:: max(1, one.numel() // _SAMPLES_PER_PARAMETER)] for one in flat]
    by_device: dict[torch.device, list[Tensor]] = {}
    for one in some:
        by_device.setdefault(one.device, []).append(one.float())
    joined = {device: torch.cat(parts).cpu().numpy().tobytes() for device, parts in by_device.items()}
    start = dict.fromkeys(joined, 0)
    for one in some:
        first = start[one.device]
        start[one.device] = first + one.numel() * 4
        yield joined[one.device][first : start[one.device]]


def down_checksums(
    view: MoELayerView, instead: Mapping[nn.Parameter, Tensor] | None = None
) -> dict[int, dict[int, int]]:
    """Layer -> expert -> `checksum` of every down-projection ``[d, h]``; layers on the meta device are left out.

    ``instead`` has what parameters held before.
    """
    found = {}
    for layer, moe in view.layers.items():
        if not any(parameter.is_meta for _, parameter in moe.experts.parameters()):
            found[layer] = _layer_checksums(moe, instead or {})
    return found


def weights_fingerprint(view: MoELayerView) -> str:
    """As `model_fingerprint`, of the weights as they are now: with every bit of every down-projection."""
    return joined_fingerprint(model_fingerprint(view), down_checksums(view))


def joined_fingerprint(fingerprint: str, down: Mapping[int, Mapping[int, int]]) -> str:
    """The `weights_fingerprint` of a model with this `model_fingerprint` and these `down_checksums`."""
    table = [[layer, sorted(experts.items())] for layer, experts in sorted(down.items())]
    return hashlib.sha256(f"{fingerprint}{json.dumps(table)}".encode()).hexdigest()


def _layer_checksums(moe: MoELayer, instead: Mapping[nn.Parameter, Tensor]) -> dict[int, int]:
    layout = moe.experts.layout
    _, parameter = moe.experts.parameters_of(0)
    if layout.storage == "packed" and not layout.transposed and parameter.dim() == 3:
        return dict(enumerate(checksums(instead.get(parameter, parameter))))
    weights = []
    for expert in range(layout.num_experts):
        _, parameter = moe.experts.parameters_of(expert)
        weights.append(expert_matrix(instead.get(parameter, parameter).detach(), expert, layout))
    return dict(enumerate(checksums_of(weights)))
