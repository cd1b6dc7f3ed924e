"""A patch's values into the files of a checkpoint, by the arithmetic that writes it into a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from easyedit_moe.checkpoints.parameters import StoredParameters
from easyedit_moe.checkpoints.targets import Patch, Target
from easyedit_moe.errors import NumericalError
from easyedit_moe.moe.layers import MoELayer, MoELayerView
from easyedit_moe.patches.tensors import TensorPatch
from easyedit_moe.patches.weights import Scratch, WeightPatch, write_groups


def write_patch(patch: Patch, stored: StoredParameters, targets: Sequence[Target]) -> None:
    """Write what a patch changes into files that hold what it was made on.

    Raises:
        NumericalError: a weight that would not be finite; the files are then half written and must be given up.
    """
    if isinstance(patch, TensorPatch):
        for target in targets:
            target.write(stored, patch.values[target.parameter])
    else:
        write_steps(patch, stored)


def write_steps(patch: WeightPatch, stored: StoredParameters) -> None:
    """Add the factored updates, in the groups and tiles in which they are added in memory, so with the same bits."""
    view = MoELayerView(stored.names.model, without_weights=True)
    scratch = Scratch()
    for layer, update in patch.steps:
        moe = view.layers[layer]
        update = update.to(device="cpu", dtype=torch.float32)
        if not update.is_finite():
            raise NumericalError(f"The update of layer {layer} holds NaN or infinity; nothing was written.")
        with torch.no_grad():
            for group in write_groups(moe.experts.layout, update, lambda run, moe=moe: _read_run(stored, moe, run)):
                group.add(layer, scratch)
                _write_run(stored, moe, group.experts, group.weights)


def _read_run(stored: StoredParameters, moe: MoELayer, experts: Sequence[int]) -> Tensor:
    return torch.stack([stored.read(*_place(moe, expert)) for expert in experts])


def _write_run(stored: StoredParameters, moe: MoELayer, experts: Sequence[int], weights: Tensor) -> None:
    for expert, weight in zip(experts, weights, strict=True):
        name, row = _place(moe, expert)
        stored.write(name, weight, row)


def _place(moe: MoELayer, expert: int) -> tuple[str, int | None]:
    """Full name of the parameter that holds an expert, and the entry of its first dimension where it holds several."""
    name, parameter = moe.experts.parameters_of(expert)
    return f"{moe.experts_name}.{name}", expert if parameter.dim() == 3 else None
