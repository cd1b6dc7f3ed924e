"""Reading a patch of either kind."""

from __future__ import annotations

import os
from pathlib import Path

from easyedit_moe.errors import PatchError
from easyedit_moe.patches.tensors import TensorPatch
from easyedit_moe.patches.weights import WeightPatch
from easyedit_moe.storage.tensors import read_metadata

_ADAPTER = "memoe-adapter"


def load_patch(path: str | Path) -> WeightPatch | TensorPatch:
    """Read a saved patch, whatever its kind.

    Raises:
        PatchError: missing, truncated or corrupt file, an adapter, or no patch of this version.
    """
    path = Path(path)
    if holds_adapter(path):
        raise _is_adapter(path)
    if os.path.isdir(path):
        raise PatchError(f"{path} is a folder; a patch is one safetensors file.")
    kind = read_metadata(path, PatchError, "save the patch anew").get("kind")
    return TensorPatch.load(path) if kind == "tensor patch" else WeightPatch.load(path)


def holds_adapter(path: str | Path) -> bool:
    """Whether a file or folder holds an adapter of MEMoE, which is no patch of weights.

    Raises:
        PatchError: a file that is missing or no safetensors file.
    """
    path = Path(path)
    if os.path.isdir(path):
        return os.path.isfile(path / "adapter.json") or os.path.isfile(path / "memoe_adapter.safetensors")
    return read_metadata(path, PatchError, "save the patch anew").get("kind") == _ADAPTER


def _is_adapter(path: Path) -> PatchError:
    return PatchError(
        f"{path} holds an adapter of MEMoE, which is no patch of weights: read it with MoEAdapter.load and hang it on "
        "the model with easyedit_moe.adapters.attachment.attach."
    )
