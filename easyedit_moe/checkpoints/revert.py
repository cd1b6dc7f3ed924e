"""Taking a patch off a checkpoint: the original, byte for byte."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from easyedit_moe.checkpoints.history import EDITS, Edit, read_history, write_history
from easyedit_moe.checkpoints.naming import CheckpointNames
from easyedit_moe.checkpoints.parameters import StoredParameters
from easyedit_moe.checkpoints.rewriting import Rewriting
from easyedit_moe.checkpoints.shards import INDEX, Checkpoint, read_json, weight_files
from easyedit_moe.checkpoints.staging import BACKUP, check_free, copy_files, new_folder, recover
from easyedit_moe.checkpoints.targets import Patch, Target, check_applied, check_dtypes, state, targets_of
from easyedit_moe.checkpoints.writing import turn
from easyedit_moe.errors import PatchError
from easyedit_moe.moe.loading import quant_method


@dataclass(frozen=True)
class _Before:
    """The checkpoint before a patch: its parameters, where each of its files is, and the patches that lay on it."""

    stored: StoredParameters
    files: dict[str, Path]
    edits: list[Edit]


def revert_patch(
    patch: Patch,
    folder: str | Path,
    out: str | Path,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write the checkpoint in ``folder`` without the patch; its files are then byte-equal to those before it.

    The originals come from ``base``, from the backup of an apply in place, or from what the patch holds (saved with
    ``keep_originals``).

    Args:
        patch: as `load_patch` reads it.
        folder: of the edited checkpoint; it is left as it is.
        out: where the result goes; absent or empty. It appears only when it is whole.
        base: folder of the checkpoint as it was before the patch.
        trust_remote_code: let code that comes with the checkpoint run; without it such a checkpoint is refused.

    Returns:
        The folder of the result.

    Raises:
        PatchError: the patch does not lie on the checkpoint, a later one must be reverted first, ``base`` is not what
            it was made on, or the originals are nowhere. CheckpointError: a folder can't be read or written. DataError:
            code of its own that is not trusted.
    """
    folder, out = Path(folder), Path(out)
    check_free(out)
    recover(folder)
    edits = read_history(folder)
    stored = StoredParameters(CheckpointNames(folder, Checkpoint.of_folder(folder), trust_remote_code))
    targets = targets_of(patch, stored.names)
    check_applied(patch, stored, targets, edits)
    left = [edit for edit in edits if edit.id != patch.id]
    trusted = trust_remote_code
    before = _of_backup(patch, folder, edits, trusted) if base is None else _of_base(Path(base), trusted)
    _check_before(patch, folder, stored, before, targets)
    with new_folder(out) as partial:
        if before is not None and any(before.stored.is_mxfp4(target.parameter) for target in targets):
            _put_back_files(patch, folder, partial, before, left)
        else:
            _put_back_values(patch, folder, partial, stored, targets, before)
        if left:
            write_history(partial, left)
    return out


def _of_base(base: Path, trusted: bool) -> _Before:
    checkpoint = Checkpoint.of_folder(base)
    files = {**checkpoint.files, **{name: base / name for name in ("config.json", INDEX) if (base / name).is_file()}}
    return _Before(StoredParameters(CheckpointNames(base, checkpoint, trusted)), files, read_history(base))


def _of_backup(patch: Patch, folder: Path, edits: Sequence[Edit], trusted: bool) -> _Before | None:
    """The checkpoint before an apply in place, whose changed files were kept; None where there is no backup."""
    kept = folder / BACKUP / patch.id
    if not kept.is_dir() or not edits or edits[-1].id != patch.id:
        return None
    names = [*weight_files(folder), "config.json", INDEX]
    files = {
        name: path for name in names if (path := kept / name if (kept / name).exists() else folder / name).exists()
    }
    checkpoint = Checkpoint({name: path for name, path in files.items() if name.endswith(".safetensors")})
    return _Before(StoredParameters(CheckpointNames(folder, checkpoint, trusted)), files, list(edits[:-1]))


def _check_before(
    patch: Patch, folder: Path, stored: StoredParameters, before: _Before | None, targets: Sequence[Target]
) -> None:
    """PatchError where there are no originals, or other ones than those on which the patch was made."""
    if before is None:
        if patch.flips:
            _check_same_form(patch, folder, stored, targets)
            return
        raise PatchError(
            f"The patch {patch.id} holds no originals, and {folder} no backup of them: pass base, the folder of the "
            "checkpoint before the patch."
        )
    check_dtypes(before.stored, targets)
    for target in targets:
        if state(target, before.stored, before.edits) != target.before:
            raise PatchError(
                f"The base does not hold the {target.parameter} on which the patch {patch.id} was made. Pass the "
                "checkpoint that was right before it."
            )


def _check_same_form(patch: Patch, folder: Path, stored: StoredParameters, targets: Sequence[Target]) -> None:
    """PatchError where the patch's own originals would give the original's values, but not its bytes."""
    dense = [target.parameter for target in targets if not stored.is_mxfp4(target.parameter)]
    if dense and quant_method(read_json(folder / "config.json")) == "mxfp4":
        raise PatchError(
            f"{dense[0]} is dense in an MXFP4 checkpoint since it was edited. The originals in the patch {patch.id} "
            "are of dense weights, so they do not give back the quantised files: pass base (--base), the checkpoint "
            "before."
        )


def _put_back_values(
    patch: Patch,
    folder: Path,
    partial: Path,
    stored: StoredParameters,
    targets: Sequence[Target],
    before: _Before | None,
) -> None:
    """Copy the edited checkpoint, and write the originals of what the patch changed."""
    rewriting = Rewriting(stored, [(target.parameter, target.row) for target in targets])
    copy_files(folder, partial, {*rewriting.files, EDITS})
    written = rewriting.start(folder, partial)
    for target in targets:
        if before is None:
            turn(patch, target, written, target.before)
        else:
            target.write(written, target.read(before.stored))


def _put_back_files(patch: Patch, folder: Path, partial: Path, before: _Before, left: Sequence[Edit]) -> None:
    """Take the base's own files, where the patch made quantised layers dense."""
    if [edit.id for edit in before.edits] != [edit.id for edit in left]:
        raise PatchError(
            f"The patch {patch.id} made quantised layers dense, so it can only be reverted to a base that holds "
            f"exactly the other patches of {folder} ({', '.join(edit.id for edit in left) or 'none'})."
        )
    copy_files(folder, partial, {*before.files, *weight_files(folder), EDITS})
    for name, path in before.files.items():
        shutil.copy2(path, partial / name)
