"""Taking a patch off a checkpoint: the original, byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from easyedit_moe.checkpoints.history import EDITS, Edit, history_text, read_history
from easyedit_moe.checkpoints.naming import CheckpointNames
from easyedit_moe.checkpoints.parameters import StoredParameters
from easyedit_moe.checkpoints.rewriting import Rewriting
from easyedit_moe.checkpoints.shards import Checkpoint
from easyedit_moe.checkpoints.staging import BACKUP, check_free, copy_files, new_folder, recover
from easyedit_moe.checkpoints.targets import Patch, Target, check_applied, state, targets_of
from easyedit_moe.errors import PatchError


def revert_patch(patch: Patch, folder: str | Path, out: str | Path, base: str | Path | None = None) -> Path:
    """Write the checkpoint in ``folder`` without the patch; files are then byte-equal to those before it.

    The originals come from ``base``, from what the patch holds (saved with ``keep_originals``), or from the backup of
    an apply in place.

    Args:
        patch: as `load_patch` reads it.
        folder: of the edited checkpoint; it is left as it is.
        out: where the result goes; absent or empty.
        base: folder of the checkpoint as it was before the patch.

    Raises:
        PatchError: the patch does not lie on the checkpoint, a later one must be reverted first, ``base`` is not what
            it was made on, or there is no source of the originals. CheckpointError: a folder can't be read or written.
    """
    folder, out = Path(folder), Path(out)
    check_free(out)
    recover(folder)
    edits = read_history(folder)
    stored = StoredParameters(CheckpointNames(folder, Checkpoint.of_folder(folder)))
    targets = targets_of(patch, stored.names)
    check_applied(patch, stored, targets, edits)
    left = [edit for edit in edits if edit.id != patch.id]
    before = None if base is None else _base(patch, Path(base), targets, left)
    with new_folder(out) as partial:
        if before is not None and _quantised_again(before, stored, targets):
            _copy_base(Path(str(base)), folder, partial, before, stored)
        else:
            _write_back(folder, partial, stored, targets, _originals(patch, before, folder))
        (partial / EDITS).unlink(missing_ok=True)
        if left:
            (partial / EDITS).write_text(history_text(left), encoding="utf-8")
    return out
