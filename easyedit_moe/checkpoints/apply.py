"""Putting a patch on a checkpoint, shard by shard, without building the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from easyedit_moe.checkpoints.history import EDITS, Edit, read_history, write_history
from easyedit_moe.checkpoints.naming import CheckpointNames
from easyedit_moe.checkpoints.parameters import StoredParameters
from easyedit_moe.checkpoints.rewriting import Rewriting
from easyedit_moe.checkpoints.shards import Checkpoint
from easyedit_moe.checkpoints.staging import check_free, copy_files, new_folder, recover, replacing_in_place
from easyedit_moe.checkpoints.targets import Patch, Target, check_applicable, targets_of
from easyedit_moe.checkpoints.writing import write_patch
from easyedit_moe.errors import CheckpointError
from easyedit_moe.patches.inspection import methods_of
from easyedit_moe.storage.checksums import checksum


def apply_patch(
    patch: Patch,
    folder: str | Path,
    out: str | Path | None = None,
    in_place: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Write an edited checkpoint: that in ``folder`` with the patch on it.

    Before anything is written, the checksum of every matrix that the patch changes is compared with what it was made
    on. All other tensors and files are byte-equal. Memory holds one matrix at a time (one layer's packed experts where
    an MXFP4 layer becomes dense). The values are those that `WeightPatch.apply` gives in memory on this machine, or
    exactly those of the machine that made the patch where it holds them (``flips``).

    Args:
        patch: as `load_patch` reads it.
        folder: of a checkpoint in safetensors.
        out: where the edited checkpoint goes; absent or empty. It appears only when it is whole.
        in_place: change ``folder`` itself instead; the files that change are kept in ``easyedit_moe_backup``. If it is
            interrupted, the next command on the folder completes or undoes it.
        trust_remote_code: let code that comes with the checkpoint run; without it such a checkpoint is refused.

    Returns:
        The folder of the edited checkpoint.

    Raises:
        AlreadyAppliedError: the patch lies on the checkpoint. PatchError: it was made on other weights, or in another
            dtype. CheckpointError: the folder can't be read or written. DataError: it has code of its own that is not
            trusted. NumericalError: a weight would not be finite.
    """
    folder = Path(folder)
    if in_place == (out is not None):
        raise CheckpointError("Give either out, a folder for the edited checkpoint, or in_place; not both.")
    target = folder if out is None else Path(out)
    if out is not None:
        check_free(target)
        if folder.resolve() in target.resolve().parents:
            raise CheckpointError(f"{target} lies within the checkpoint {folder}; give a folder outside it.")
    recover(folder)
    edits = read_history(folder)
    stored = StoredParameters(CheckpointNames(folder, Checkpoint.of_folder(folder), trust_remote_code))
    targets = targets_of(patch, stored.names)
    check_applicable(patch, stored, targets, edits)
    rewriting = Rewriting(stored, [(target.parameter, target.row) for target in targets])
    if out is None:
        with replacing_in_place(folder, patch.id) as partial:
            _write(patch, folder, partial, rewriting, targets, edits)
    else:
        with new_folder(target) as partial:
            copy_files(folder, partial, {*rewriting.files, EDITS})
            _write(patch, folder, partial, rewriting, targets, edits)
    return target


def edit_of(patch: Patch, stored: StoredParameters | None = None, targets: Sequence[Target] = ()) -> Edit:
    """A patch as an entry of a history, with the checksums of what was written where these are not the patch's own."""
    found = {} if stored is None else {target: checksum(target.read(stored)) for target in targets}
    own = {target.key: (target.after, value) for target, value in found.items() if value != target.after}
    return Edit(patch.id, patch.parent, ", ".join(methods_of(patch)), own)


def _write(
    patch: Patch, folder: Path, partial: Path, rewriting: Rewriting, targets: list[Target], edits: list[Edit]
) -> None:
    written = rewriting.start(folder, partial)
    write_patch(patch, written, targets)
    entry = edit_of(patch, written, targets)
    write_history(partial, [*edits, entry])
