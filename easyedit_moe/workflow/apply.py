"""``apply``: a patch file on a checkpoint's files, shard by shard."""

from __future__ import annotations

import os
from pathlib import Path

from easyedit_moe import factworld
from easyedit_moe.checkpoints.apply import apply_patch
from easyedit_moe.checkpoints.saving import source_folder
from easyedit_moe.errors import CheckpointError
from easyedit_moe.patches.files import load_patch


def apply(
    patch: str | Path,
    model: str | Path,
    out: str | Path | None = None,
    in_place: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Write an edited checkpoint without building the model; see `easyedit_moe.checkpoints.apply.apply_patch`.

    Args:
        patch: file.
        model: folder of a checkpoint, a hub name whose files are in the cache, or "factworld".
        out: folder for the edited checkpoint; absent or empty.
        in_place: change the folder ``model`` instead, with a backup of the files that change.
        trust_remote_code: let code that comes with the checkpoint run; without it such a checkpoint is refused.

    Returns:
        The folder of the edited checkpoint.

    Raises:
        PatchError: no patch, or one that does not fit; AlreadyAppliedError where it lies on the checkpoint. DataError:
            no such model. CheckpointError: neither or both of ``out`` and ``in_place``, in place on a model that is
            not a folder of one's own, or a folder that can't be used.
    """
    if in_place and not _is_own_folder(model):
        raise CheckpointError(
            f"{model} is a model by its name, which others share, so it is not changed in place. Give --out, or the "
            "folder of a checkpoint of your own."
        )
    return apply_patch(load_patch(patch), source_folder(str(model)), out, in_place, trust_remote_code)


def _is_own_folder(model: str | Path) -> bool:
    return str(model) != factworld.MODEL_NAME and os.path.isdir(model)
