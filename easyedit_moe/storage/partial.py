"""Folders for what is not finished yet, each locked while its process lives, so that what was left is told from it.

A lock is the operating system's own (flock, by way of filelock): it goes with its process, however that ends.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

LOCK = ".easyedit_moe_lock"
MARK = ".partial-"
"""Within the names of unfinished folders."""
_SHOWN = 40
"""Characters of a name that its unfinished folder shows; a whole one might leave no room for the rest."""
_TRIES = 8


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path``, on the same file system; it is gone afterwards.

    Folders that killed processes left beside ``path`` are removed first.

    Raises:
        OSError: it can't be made.
    """
    remove_leftovers(path.parent)
    folder, lock = _locked_folder(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished folders in ``folder`` whose process is no more; those of living ones stay.

    What can't be removed stays, too; a line of the log says so.
    """
    for left in folder.glob(f".*{MARK}*"):
        if not _is_ours(left):
            continue
        lock = FileLock(left / LOCK, timeout=0)
        try:
            with lock:
                shutil.rmtree(left)
                logger.info("Removed %s, which a process that was stopped left.", left)
        except Timeout:
            continue
        except (OSError, NotImplementedError) as error:  # a file system without locks can't say whose it is
            logger.info("%s is not finished, and was not removed: %s", left, error)


def _is_ours(left: Path) -> bool:
    """Whether a folder has a lock of ours, or nothing yet: its process may have ended before it had one."""
    if left.is_symlink() or not left.is_dir():
        return False
    try:
        return (left / LOCK).exists() or not any(left.iterdir())
    except OSError:
        return False


def _locked_folder(path: Path) -> tuple[Path, FileLock]:
    for _ in range(_TRIES):
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:_SHOWN]}{MARK}"))
        lock = FileLock(folder / LOCK, timeout=0)
        try:
            lock.acquire()
        except NotImplementedError:
            return folder, lock
        except Timeout:
            continue  # another process took it for a leftover before it was locked
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if (folder / LOCK).exists():
            return folder, lock
        lock.release()
    raise OSError(f"no folder could be locked beside {path}")
