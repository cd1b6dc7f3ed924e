"""The matrices that a patch changes, as they lie in a checkpoint, and in which state they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from easyedit_moe.checkpoints.history import Edit
from easyedit_moe.checkpoints.naming import CheckpointNames, Row
from easyedit_moe.checkpoints.parameters import StoredParameters
from easyedit_moe.errors import AlreadyAppliedError, PatchError
from easyedit_moe.hparams.sites import EXPERTS
from easyedit_moe.moe.layers import MoELayer, MoELayerView
from easyedit_moe.patches.tensors import TensorPatch
from easyedit_moe.patches.weights import WeightPatch
from easyedit_moe.storage.checksums import checksum

Patch = WeightPatch | TensorPatch


@dataclass(frozen=True)
class Target:
    """One matrix that a patch changes.

    Attributes:
        key: by which the patch and the history know it: "12.7" for layer 12, expert 7, "dense.12.0" at another site, or
            a parameter's name.
        parameter, row: where it is in memory: a parameter, and which part of it.
        turned: whether the matrix ``[d, h]`` is stored as ``[h, d]``.
        before, after: its checksums.
        dtype: in which the patch was made.
    """

    key: str
    parameter: str
    row: Row
    turned: bool
    before: int
    after: int
    dtype: torch.dtype

    def read(self, stored: StoredParameters) -> Tensor:
        """The matrix as the patch sees it."""
        value = stored.read(self.parameter, self.row)
        return value.mT if self.turned else value

    def write(self, stored: StoredParameters, value: Tensor) -> None:
        """Overwrite the matrix."""
        stored.write(self.parameter, value.mT.contiguous() if self.turned else value, self.row)


def targets_of(patch: Patch, names: CheckpointNames) -> list[Target]:
    """What a patch changes in the model of a checkpoint.

    Raises:
        PatchError: the model has no such layers, experts or parameters, or of another shape.
    """
    if isinstance(patch, TensorPatch):
        return [_tensor_target(patch, names, name) for name in patch.names]
    view = MoELayerView(names.model, without_weights=True, site=patch.site)
    for layer, update in patch.steps:
        if layer not in view.layers:
            raise PatchError(f"This patch changes layer {layer}; the checkpoint has {sorted(view.layers)}.")
        patch.check_fits(view, layer, update)
    return [
        expert_target(patch, view.layers[layer], expert)
        for layer, experts in patch.before.items()
        for expert in experts
    ]


def expert_target(patch: WeightPatch, moe: MoELayer, expert: int) -> Target:
    """One expert's down-projection; at another site than the routed experts its key names the site."""
    name, row = place_of(moe, expert)
    site = "" if patch.site == EXPERTS else f"{patch.site}."
    return Target(
        f"{site}{moe.index}.{expert}",
        name,
        row,
        moe.experts.layout.transposed,
        patch.before[moe.index][expert],
        patch.after[moe.index][expert],
        dtype_named(patch.dtypes[moe.index]),
    )


def place_of(moe: MoELayer, expert: int) -> tuple[str, Row]:
    """Full name of the parameter that holds an expert's down-projection, and which part of it that is."""
    name, parameter = moe.experts.parameters_of(expert)
    full, count = f"{moe.experts_name}.{name}", moe.experts.layout.num_experts
    if parameter.dim() == 3:
        return full, expert
    if moe.experts.layout.storage != "packed" or count == 1:
        return full, None
    rows = len(parameter) // count  # the experts lie below one another
    return full, range(expert * rows, (expert + 1) * rows)


def check_applicable(patch: Patch, stored: StoredParameters, targets: Sequence[Target], edits: Sequence[Edit]) -> None:
    """Refuse a checkpoint that does not hold the very weights on which the patch was made.

    Raises:
        AlreadyAppliedError: the patch lies on it. PatchError: another dtype or other weights; the first tensor is
            named, and the parent patch where that is what is missing.
    """
    check_dtypes(stored, targets)
    states = [state(target, stored, edits) for target in targets]
    if all(found in (target.before, target.after) for found, target in zip(states, targets, strict=True)):
        changed = [(f, t) for f, t in zip(states, targets, strict=True) if t.before != t.after]
        if all(found == target.before for found, target in changed):
            return
        if all(found == target.after for found, target in changed):
            raise AlreadyAppliedError(f"The patch {patch.id} already lies on this checkpoint; it is not applied twice.")
    first = next(t for f, t in zip(states, targets, strict=True) if f != t.before)
    known = [edit.id for edit in edits]
    if patch.parent is not None and patch.parent not in known:
        reason = f"It was made on a model that held the patch {patch.parent}: apply that one first."
    elif known:
        reason = f"The checkpoint holds the patches {', '.join(known)}; revert what the patch was made without."
    else:
        reason = "Apply it to the checkpoint it was made on."
    raise PatchError(
        f"{_named(first, stored)} does not hold the weights on which the patch {patch.id} was made. {reason}"
    )


def check_applied(patch: Patch, stored: StoredParameters, targets: Sequence[Target], edits: Sequence[Edit]) -> None:
    """Refuse a checkpoint on which the patch does not lie as the last word about each of its matrices.

    Raises:
        PatchError: it is not applied, or something changed a matrix since; the first tensor is named.
    """
    check_dtypes(stored, targets)
    for target in targets:
        found = state(target, stored, edits)
        if found == target.after:
            continue
        known = [edit.id for edit in edits]
        later = known[known.index(patch.id) + 1 :] if patch.id in known else []
        reason = f"Revert the later patches {', '.join(later)} first." if later else "Is it applied here at all?"
        raise PatchError(
            f"{_named(target, stored)} does not hold what the patch {patch.id} wrote, so it can't be reverted. {reason}"
        )


def state(target: Target, stored: StoredParameters, edits: Sequence[Edit]) -> int:
    """The checksum of a matrix, as patches know it: where this machine rounded differently, that of the patch."""
    found = checksum(target.read(stored))
    for edit in edits:
        recorded, own = edit.own.get(target.key, (None, None))
        if recorded is not None and own == found:
            return recorded
    return found


def check_dtypes(stored: StoredParameters, targets: Sequence[Target]) -> None:
    """Refuse a checkpoint in another dtype than that of the patch; PatchError."""
    for target in targets:
        found = stored.dtype(target.parameter)
        if found.itemsize < 2:
            kind = str(found).removeprefix("torch.")
            raise PatchError(
                f"{_named(target, stored)} is stored quantised, as {kind}, so a patch can't be written into the file. "
                "Make the edit with edit --save checkpoint, which writes the edited layers dense, or serve the patch "
                "as an adapter (export)."
            )
        if found != target.dtype:
            raise PatchError(
                f"{_named(target, stored)} is stored as {str(found).removeprefix('torch.')}; the patch was made on a "
                f"model in {str(target.dtype).removeprefix('torch.')}. Make the edit on the model loaded in the "
                "checkpoint's dtype, or save the edited model."
            )


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype of a name such as "bfloat16"."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise PatchError(f"The patch names the dtype {name!r}, which torch does not have.")
    return found


def _tensor_target(patch: TensorPatch, names: CheckpointNames, name: str) -> Target:
    value, parameter = patch.values[name], names.parameters.get(name)
    if parameter is None or parameter.shape != value.shape:
        found = "nothing" if parameter is None else str(tuple(parameter.shape))
        raise PatchError(f"This patch holds {name} as {tuple(value.shape)}; the checkpoint's model has {found} there.")
    return Target(name, name, None, False, patch.before[name], patch.after[name], value.dtype)


def _named(target: Target, stored: StoredParameters) -> str:
    tensors = stored.tensors(target.parameter, target.row)
    if len(tensors) == 1 and target.row is None:
        return tensors[0]
    part = f"rows {target.row[0]} to {target.row[-1]}" if isinstance(target.row, range) else f"entry {target.row}"
    return f"{tensors[0]} ({part})"
