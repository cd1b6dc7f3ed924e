"""A patch's values into the files of a checkpoint, by the arithmetic that writes it into a model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from easyedit_moe.checkpoints.parameters import StoredParameters
from easyedit_moe.checkpoints.targets import Patch, Target, place_of
from easyedit_moe.errors import NumericalError, PatchError
from easyedit_moe.moe.layers import MoELayer, MoELayerView
from easyedit_moe.patches.flips import flipped
from easyedit_moe.patches.groups import add_groups, groups_of
from easyedit_moe.patches.tensors import TensorPatch
from easyedit_moe.patches.weights import WeightPatch
from easyedit_moe.storage.checksums import checksum


def write_patch(patch: Patch, stored: StoredParameters, targets: Sequence[Target]) -> None:
    """Write what a patch changes into files that hold what it was made on.

    Raises:
        NumericalError: a weight that would not be finite; the files are then half written and must be given up.
    """
    if isinstance(patch, TensorPatch):
        for target in targets:
            target.write(stored, patch.values[target.parameter])
    elif patch.flips:
        for target in targets:
            turn(patch, target, stored, target.after)
    else:
        write_steps(patch, stored)


def turn(patch: Patch, target: Target, stored: StoredParameters, expected: int) -> None:
    """Turn the bits that a patch turned in one matrix, there or back.

    Raises:
        PatchError: what comes out does not have the expected checksum.
    """
    value = target.read(stored)
    turned = flipped(value, flips_of(patch, target)).view(value.shape)
    if checksum(turned) != expected:
        raise PatchError(
            f"The originals in the patch {patch.id} do not lead to what {target.parameter} should be. Where the patch "
            "was applied without them, this machine may have rounded it differently: revert it with its base."
        )
    target.write(stored, turned)


def flips_of(patch: Patch, target: Target) -> Tensor:
    """The compressed bits of one matrix."""
    if isinstance(patch, TensorPatch):
        return patch.flips[target.parameter]
    layer, expert = target.key.split(".")[-2:]
    return patch.flips[int(layer)][int(expert)]


def write_steps(patch: WeightPatch, stored: StoredParameters) -> None:
    """Add the updates, in the groups and tiles in which they are added in memory, so with the same bits."""
    view = MoELayerView(stored.names.model, without_weights=True, site=patch.site)
    for layer, update in patch.steps:
        moe = view.layers[layer]
        update = update.to(device="cpu", dtype=torch.float32)
        if not update.is_finite():
            raise NumericalError(f"The update of layer {layer} holds NaN or infinity; nothing was written.")
        with torch.no_grad():
            for added in add_groups(moe, groups_of(moe, update, partial(_read_run, stored, moe))):
                _write_run(stored, moe, added.group.experts, added.group.weights)


def _read_run(stored: StoredParameters, moe: MoELayer, experts: Sequence[int]) -> Tensor:
    return torch.stack([stored.read(*place_of(moe, expert)) for expert in experts])


def _write_run(stored: StoredParameters, moe: MoELayer, experts: Sequence[int], weights: Tensor) -> None:
    for expert, weight in zip(experts, weights, strict=True):
        name, row = place_of(moe, expert)
        stored.write(name, weight, row)
