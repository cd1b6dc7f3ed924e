"""What both kinds of patches check: not applied twice, on the model they are for, read from a file of their kind."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from easyedit_moe.errors import PatchError
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.storage.tensors import read_safetensors

SCHEMA = 1


def check_not_applied(originals: object) -> None:
    """Refuse a patch that holds originals: it lies on a model.

    Raises:
        PatchError: it is applied.
    """
    if originals:
        raise PatchError("This patch is already applied; revert it first.")


def check_model(view: MoELayerView, fingerprint: str, without: Iterable[str] = ()) -> None:
    """Refuse a model whose fingerprint, parameters ``without`` left out, is another.

    Raises:
        PatchError: the patch was made for another model.
    """
    found = model_fingerprint(view, without)
    if found != fingerprint:
        raise PatchError(
            f"This patch was made for another model: expected fingerprint {fingerprint[:16]}, found {found[:16]}. Load "
            "the model it was made for, in the same dtype."
        )


def read_patch(path: str | Path, kind: str, called: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a saved patch of one kind, which people call ``called``.

    Raises:
        PatchError: missing, truncated or corrupt file, or another kind.
    """
    tensors, metadata = read_safetensors(Path(path), PatchError, "save the patch anew")
    if metadata.get("kind") != kind or metadata.get("schema") != SCHEMA:
        raise PatchError(f"{path} is not a {called} of schema {SCHEMA}.")
    return tensors, metadata


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    from easyedit_moe import __version__

    return {
        "easyedit_moe": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
