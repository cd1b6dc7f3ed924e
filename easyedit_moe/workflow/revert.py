"""``revert``: a checkpoint without a patch, byte for byte."""

from __future__ import annotations

from pathlib import Path

from easyedit_moe.checkpoints.revert import revert_patch
from easyedit_moe.checkpoints.saving import source_folder
from easyedit_moe.patches.files import load_patch


def revert(
    patch: str | Path,
    model: str | Path,
    out: str | Path,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write the checkpoint without the patch; see `easyedit_moe.checkpoints.revert.revert_patch`.

    Args:
        patch: file.
        model: folder of the edited checkpoint; it is left as it is.
        out: folder for the result; absent or empty.
        base: the checkpoint before the patch: a folder, a hub name whose files are in the cache, or "factworld". By
            default the originals come from the patch (``keep_originals``) or from the backup of an apply in place.
        trust_remote_code: let code that comes with the checkpoint run; without it such a checkpoint is refused.

    Returns:
        The folder of the result.

    Raises:
        PatchError: no patch, it does not lie on the checkpoint, or its originals are nowhere. DataError: no such model.
        CheckpointError: a folder that can't be used.
    """
    source = None if base is None else source_folder(str(base))
    return revert_patch(load_patch(patch), source_folder(str(model)), out, source, trust_remote_code)
