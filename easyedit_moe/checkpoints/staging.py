"""New content of a checkpoint's folder: written beside in full, then put in its place, so that no half is seen."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from easyedit_moe.checkpoints.shards import read_json
from easyedit_moe.errors import CheckpointError
from easyedit_moe.storage.files import path_of, unwritable

PARTIAL = ".easyedit_moe_partial"
BACKUP = "easyedit_moe_backup"
_JOURNAL = "journal.json"
_LOCK = ".easyedit_moe_lock"
_NOT_COPIED = {PARTIAL, BACKUP, _LOCK, ".git", ".cache"}


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out`` that takes its place, flushed to the disk, if nothing raises inside.

    Raises:
        CheckpointError: ``out`` exists and is not an empty folder.
    """
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.partial-"))
    try:
        yield partial
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o777 & ~mask)
        flush_folder(partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
        _flush(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(out: str | Path) -> Path:
    """The path of a new folder; CheckpointError for one that holds something, or can't be made where it is to be."""
    out = path_of(out, "the output folder", CheckpointError)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not an empty folder. Give another one, or delete it.")
    if reason := unwritable(out):
        raise CheckpointError(f"{out} can't be written: {reason}. Give another folder.")
    return out


def copy_files(source: Path, target: Path, without: set[str]) -> None:
    """Copy what lies in a checkpoint's folder, except files of these names and what this package keeps for itself."""
    for path in sorted(source.iterdir()):
        if path.name in without or path.name in _NOT_COPIED:
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copy2(path, target / path.name)


@contextmanager
def replacing_in_place(folder: Path, name: str) -> Iterator[Path]:
    """A folder for new files; when nothing raises inside, they replace those of the same names, which are backed up.

    All new files are on the disk before the first one is put in place, and a journal says which they are: what is
    interrupted before is undone by `recover`, what is interrupted after is completed by it. Backups lie in
    ``easyedit_moe_backup/<name>``.
    """
    with _locked(folder):
        partial = folder / PARTIAL
        partial.mkdir()
        try:
            yield partial
            files = sorted(path.name for path in partial.iterdir())
            flush_folder(partial)
            _back_up(folder, files, folder / BACKUP / name)
            journal = partial / f".{_JOURNAL}"
            journal.write_text(json.dumps({"files": files}), encoding="utf-8")
            _flush(journal)
            journal.rename(partial / _JOURNAL)
            _flush(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _complete(folder)


def recover(folder: Path) -> None:
    """Finish or undo an in-place change that was interrupted.

    Raises:
        CheckpointError: another command is at work in this folder.
    """
    if (folder / PARTIAL).is_dir():
        with _locked(folder):
            _complete(folder)


def flush_folder(folder: Path) -> None:
    """Have the system write all files of a folder to the disk."""
    for path in folder.rglob("*"):
        _flush(path)
    _flush(folder)


def _complete(folder: Path) -> None:
    partial = folder / PARTIAL
    if (partial / _JOURNAL).is_file():
        for file in read_json(partial / _JOURNAL)["files"]:
            if (partial / file).exists():
                (partial / file).replace(folder / file)
        _flush(folder)
    shutil.rmtree(partial, ignore_errors=True)


def _back_up(folder: Path, files: list[str], backup: Path) -> None:
    """Keep the files that will be replaced. A second name is enough, since they are replaced and not overwritten."""
    backup.mkdir(parents=True, exist_ok=True)
    for file in files:
        old, kept = (folder / file).resolve(), backup / file
        if not old.exists():
            continue
        kept.unlink(missing_ok=True)
        try:
            os.link(old, kept)
        except OSError:
            shutil.copy2(old, kept)
            _flush(kept)
    _flush(backup)


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


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
