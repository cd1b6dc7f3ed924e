"""Patches of one run: they share one set of originals, and what was in between is computed again when it is asked for.

Of each matrix only the patch that changes it first keeps the original, in main memory. What a later patch overwrote is
what the steps of those before it make of that original: the arithmetic of a write is the same each time, and checksums
prove it. So a run holds one copy of what it changed, however many patches it is made of.

A patch of whole tensors holds what it wrote, which is what the next one overwrote (`continues_tensors`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from easyedit_moe.algebra.core_update import Update
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches.checks import check_originals
from easyedit_moe.patches.groups import add_groups, groups_of

if TYPE_CHECKING:
    from easyedit_moe.patches.tensors import TensorPatch
    from easyedit_moe.patches.weights import WeightPatch

Matrices = dict[int, dict[int, Tensor]]
"""Layer -> expert -> ``[d, h]``."""


def continues(patch: WeightPatch, earlier: WeightPatch | None, keep_originals: bool = True) -> None:
    """Make a patch that was just written part of a run: it keeps those originals only that no earlier patch has.

    Layers that share matrices with others keep theirs: what was written there is known under one name only.

    Args:
        patch: applied, and not changed since.
        earlier: the newest patch of the run before it, applied to the same model; None, or one that was
            reverted or is of another site: the run begins.
        keep_originals: False: the patch keeps none; it is then reverted with the unedited model as ``base``.
    """
    same = earlier is not None and bool(earlier.written) and earlier.site == patch.site
    patch.earlier = earlier = earlier if same else None
    if not keep_originals:
        patch.originals = {}
        return
    patch.plain = _knows_all(patch) and (earlier is None or earlier.plain)
    left = _left_by(earlier, set(patch.matrices())) if patch.plain else {}
    # What something else wrote in between is not computed again.
    known = {(n, expert) for (n, expert), found in left.items() if found == patch.before[n][expert]}
    kept = {(n, e): w for n, experts in patch.originals.items() for e, w in experts.items() if (n, e) not in known}
    originals: Matrices = {layer: {} for layer in patch.originals}
    for (layer, expert), weight in zip(kept, _in_main_memory(list(kept.values())), strict=True):
        originals[layer][expert] = weight
    patch.originals = originals


def continues_tensors(patch: TensorPatch, run: Sequence[TensorPatch]) -> None:
    """Make a patch of whole tensors part of a run: the originals that an earlier patch wrote are that one's values.

    Nothing is copied or computed: where the last patch before it that wrote a parameter left the bits that it found,
    both hold the same tensor from now on. So of each parameter only the first patch that changes it holds an original
    of its own, and a patch is taken back as if it were alone.

    Args:
        patch: applied, and not changed since.
        run: the patches before it on the same model that are still applied, oldest first.
    """
    shared = dict(patch.originals)
    for name in patch.originals:
        last = next((other for other in reversed(run) if name in other.values), None)
        # What something else wrote in between is held apart.
        if last is not None and last.applied and last.after[name] == patch.before[name]:
            shared[name] = last.values[name]
    patch.originals = shared


def overwritten(patch: WeightPatch, view: MoELayerView, base: Matrices | None = None) -> Matrices:
    """What lay in every matrix of an applied patch before it, bit for bit; ``base`` has the originals of the run.

    Raises:
        PatchError: the steps do not lead there on this machine any more, as with another number of threads.
    """
    found = {layer: dict(experts) for layer, experts in patch.originals.items()}
    missing = [(layer, expert) for layer, expert in patch.matrices() if expert not in found.get(layer, {})]
    if not missing:
        return found
    run = list(run_of(patch.earlier))[::-1]
    for layer in sorted({layer for layer, _ in missing}):
        state = dict((base or {}).get(layer, {}))
        for part in run:
            state = {**part.originals.get(layer, {}), **state}
        steps = [update for part in run for number, update in part.steps if number == layer]
        state = replayed(view, layer, state, steps)
        again = {expert: state[expert] for number, expert in missing if number == layer and expert in state}
        check_originals(layer, again, patch.before[layer])
        found.setdefault(layer, {}).update(again)
    return found


def replayed(view: MoELayerView, layer: int, state: dict[int, Tensor], steps: Sequence[Update]) -> dict[int, Tensor]:
    """What updates in a row make of a layer's matrices ``[d, h]``, as `PatchWriter.write` does it; on its device."""
    moe = view.layers[layer]
    device = next(iter(moe.experts.parameters()))[1].device
    turned = moe.experts.layout.transposed
    stored = {expert: (w.mT if turned else w).to(device, copy=True) for expert, w in state.items()}

    def weights(experts: tuple[int, ...]) -> Tensor:
        return torch.stack([stored[expert] for expert in experts])

    with torch.no_grad():
        for update in steps:
            for added in add_groups(moe, groups_of(moe, update.to(device=device, dtype=torch.float32), weights)):
                stored.update(zip(added.group.experts, added.group.weights.unbind(), strict=True))
    return {expert: w.mT if turned else w for expert, w in stored.items()}


def run_of(patch: WeightPatch | None) -> Iterator[WeightPatch]:
    """A patch and those before it, newest first."""
    while patch is not None:
        yield patch
        patch = patch.earlier


def _left_by(patch: WeightPatch | None, wanted: set[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Checksums that a run left of some matrices, where it wrote them: as a rule its last patch wrote most."""
    found: dict[tuple[int, int], int] = {}
    for part in run_of(patch):
        if not wanted:
            break
        new = wanted & set(part.matrices())
        found.update({(layer, expert): part.written[layer][expert] for layer, expert in new})
        wanted = wanted - new
    return found


def _knows_all(patch: WeightPatch) -> bool:
    """Whether every matrix that a patch's steps write has a checksum under that very layer and expert."""
    return all(expert in patch.before.get(layer, {}) for layer, update in patch.steps for expert in update.experts)


def put_back(weight: Tensor, original: Tensor) -> None:
    """Copy an original into a model; the CPU goes on while one in pinned memory is on its way to a GPU."""
    # Only in this direction: what is copied from a GPU without waiting may be read before it is there.
    weight.copy_(original, non_blocking=weight.is_cuda)


def _in_main_memory(weights: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the CPU, pinned where they come from a GPU, for which the CPU waits once.

    Each has memory of its own, so that the larger allocation of which it was a view is let go.
    """
    found, streams = [], {}
    for weight in weights:
        if weight.device.type == "cpu":
            found.append(weight.clone(memory_format=torch.preserve_format))
            continue
        if weight.is_cuda:
            streams[weight.device] = torch.cuda.current_stream(weight.device)
        held = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=weight.is_cuda)
        found.append(held.copy_(weight, non_blocking=weight.is_cuda))
    for stream in streams.values():
        stream.synchronize()
    return found
