"""What tells one model from another, edits left out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from easyedit_moe.moe.layers import MoELayerView

_SAMPLES_PER_PARAMETER = 1024


def model_fingerprint(view: MoELayerView, without: Iterable[str] = ()) -> str:
    """SHA-256 over class, shapes, dtypes and a strided sample of every parameter except the down-projections.

    What an edit writes is left out, so that the fingerprint is that of the unedited model before and after it; where
    that is more than down-projections, ``without`` names the other parameters.
    """
    skip = {name for moe in view.layers.values() for name in moe.parameter_names()} | set(without)
    state = hashlib.sha256(type(view.model).__name__.encode())
    for name, parameter in view.model.named_parameters():
        state.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        if name in skip or parameter.is_meta:
            continue
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES_PER_PARAMETER)]
        state.update(sample.float().cpu().numpy().tobytes())
    return state.hexdigest()
