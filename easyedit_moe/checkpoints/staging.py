"""New content of a checkpoint's folder: written beside in full, then put in its place, so that no half is seen."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from easyedit_moe.checkpoints.shards import read_json
from easyedit_moe.errors import CheckpointError
from easyedit_moe.storage import files
from easyedit_moe.storage.files import check_writable, flush, flush_folder, writing

PARTIAL = ".easyedit_moe_partial"
BACKUP = "easyedit_moe_backup"
_JOURNAL = "journal.json"
_LOCK = ".easyedit_moe_lock"
_NOT_COPIED = {PARTIAL, BACKUP, _LOCK, ".git", ".cache"}


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """`easyedit_moe.storage.files.new_folder` at a place that `check_free` takes.

    Raises:
        CheckpointError: ``out`` exists and is not an empty folder. WriteError: it can't be written.
    """
    check_free(out)
    with files.new_folder(out) as partial:
        yield partial


def check_free(out: Path) -> None:
    """Refuse a folder that holds something, or that can't be made.

    Raises:
        CheckpointError: it exists and is not an empty folder. WriteError: nothing can be written there.
    """
    check_writable(out)
    with writing(out):
        taken = os.path.lexists(out) and (not os.path.isdir(out) or any(out.iterdir()))
    if taken:
        raise CheckpointError(f"{out} exists and is not an empty folder. Give another one, or delete it.")


def copy_files(source: Path, target: Path, without: set[str]) -> None:
    """Copy what lies in a checkpoint's folder, except files of these names and what this package keeps for itself."""
    for path in sorted(source.iterdir()):
        if path.name in without or path.name in _NOT_COPIED:
            continue
        if os.path.isdir(path):
            shutil.copytree(path, target / path.name)
        else:
            shutil.copy2(path, target / path.name)


@contextmanager
def replacing_in_place(folder: Path, name: str) -> Iterator[Path]:
    """A folder for new files; when nothing raises inside, they replace those of the same names, which are backed up.

    All new files are on the disk before the first one is put in place, and a journal says which they are: what is
    interrupted before is undone by `recover`, what is interrupted after is completed by it. Backups lie in
    ``easyedit_moe_backup/<name>``.

    Raises:
        CheckpointError: another command is at work in this folder. WriteError: the folder can't be written to; its
            files are as they were.
    """
    partial = folder / PARTIAL
    with writing(folder, partial), _locked(folder):
        partial.mkdir()
        try:
            yield partial
            names = sorted(path.name for path in partial.iterdir())
            flush_folder(partial)
            _back_up(folder, names, folder / BACKUP / name)
            journal = partial / f".{_JOURNAL}"
            journal.write_text(json.dumps({"files": names}), encoding="utf-8")
            flush(journal)
            journal.rename(partial / _JOURNAL)
            flush(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _complete(folder)


def recover(folder: Path) -> None:
    """Finish or undo an in-place change that was interrupted.

    Raises:
        CheckpointError: another command is at work in this folder. WriteError: the folder can't be written to.
    """
    if os.path.isdir(folder / PARTIAL):
        with writing(folder), _locked(folder):
            _complete(folder)


def _complete(folder: Path) -> None:
    partial = folder / PARTIAL
    if os.path.isfile(partial / _JOURNAL):
        for file in read_json(partial / _JOURNAL)["files"]:
            if os.path.exists(partial / file):
                (partial / file).replace(folder / file)
        flush(folder)
    shutil.rmtree(partial, ignore_errors=True)


def _back_up(folder: Path, names: list[str], backup: Path) -> None:
    """Keep the files that will be replaced. A second name is enough, since they are replaced and not overwritten."""
    backup.mkdir(parents=True, exist_ok=True)
    for file in names:
        old, kept = (folder / file).resolve(), backup / file
        if not os.path.exists(old):
            continue
        kept.unlink(missing_ok=True)
        try:
            os.link(old, kept)
        except OSError:
            shutil.copy2(old, kept)
            flush(kept)
    flush(backup)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    path = folder / _LOCK
    try:
        with FileLock(path, timeout=0):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    except Timeout as error:
        raise CheckpointError(f"Another command is changing {folder}; wait until it has ended.") from error
