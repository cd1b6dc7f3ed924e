"""``merge``: the patches of a chain as one file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from easyedit_moe.errors import PatchError
from easyedit_moe.patches.files import load_patch
from easyedit_moe.patches.merging import folded
from easyedit_moe.patches.merging import merge as merged
from easyedit_moe.patches.tensors import TensorPatch
from easyedit_moe.patches.weights import WeightPatch
from easyedit_moe.storage.files import check_writable, path_of


def merge(patches: Sequence[str | Path], out: str | Path, fold: bool = False) -> WeightPatch | TensorPatch:
    """Write one patch that does what several do in the order in which they are given, oldest first.

    The checkpoint that results is bit-equal to applying them one after the other, unless the patch is folded. It holds
    originals if all of them do.

    Args:
        patches: files.
        out: file for the result; it must not exist.
        fold: one update for each layer instead of one per patch, of the rank that a matrix can have at most
            (`easyedit_moe.patches.merging.folded`): smaller where there are many, and the same weights up to rounding,
            or to the bit where the patches hold originals.

    Returns:
        The merged patch, not applied.

    Raises:
        PatchError: fewer than two patches, one that can't be read, a gap or a wrong order, both kinds of patches,
            whole tensors to fold, or a file that exists. WriteError: the file can't be written.
    """
    if len(patches) < 2:
        raise PatchError(f"Merging takes at least two patches; found {len(patches)}.")
    path = path_of(out, "the merged patch", PatchError)
    if os.path.exists(path):
        raise PatchError(f"{path} exists; give another name for the merged patch, or delete it.")
    if path.suffix != ".safetensors":
        raise PatchError(f"A patch is a .safetensors file; found {path.name!r} as the name of the merged patch.")
    check_writable(path)
    whole = merged([load_patch(patch) for patch in patches])
    if fold:
        if isinstance(whole, TensorPatch):
            raise PatchError("Patches of whole tensors hold each tensor once and can't be folded; merge them without.")
        whole = folded(whole)
    whole.save(path, keep_originals=bool(whole.flips))
    return whole
