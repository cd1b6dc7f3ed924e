"""Files and folders that appear in full or not at all, and one error for all that keeps them from it.

Everything that the package writes goes through here: a file system that is full, read-only or in the way raises
`easyedit_moe.errors.WriteError`, which names the path, and what was there before stays as it was.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from easyedit_moe.errors import EditingError, WriteError, shown
from easyedit_moe.storage.partial import MARK, partial_folder

logger = logging.getLogger(__name__)

_ADVICE = {
    errno.ENOSPC: "Free some space there, or choose another place",
    errno.EDQUOT: "Free some space there, or choose another place",
    errno.EFBIG: "The file system takes no file of this size; choose another place",
    errno.EACCES: "Allow this user to write there, or choose another place",
    errno.EPERM: "Allow this user to write there, or choose another place",
    errno.EROFS: "The file system is read-only; choose another place",
    errno.EISDIR: "A folder is in the way; choose another name, or move it",
    errno.ENOTDIR: "A file is in the way of a folder; choose another name, or move it",
    errno.EEXIST: "Something else is in the way; choose another name, or move it",
    errno.ENOTEMPTY: "A folder that is not empty is in the way; choose another name, or move it",
    errno.ENAMETOOLONG: "Choose a shorter name",
}
_OTHERWISE = "Choose another place, or mend the file system"


def path_of(value: Any, name: str, error: type[Exception]) -> Path:
    """The path that a user gave; ``name`` is what messages call it.

    Raises:
        ``error``: neither a text nor a path, empty, or with characters that no path has.
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise error(f"{name} must be a path; found {shown(value)} ({type(value).__name__}).")
    text = os.fspath(value)
    if not text or "\0" in text:
        raise error(f"{name} must be a path, which is not empty and holds no NUL; found {shown(text)}.")
    return Path(text)


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether there is such a file; no error for a name that no file can have, or a folder that is closed."""
    return os.path.isfile(path)


def is_folder(path: str | os.PathLike[str]) -> bool:
    """As `is_file`, of a folder."""
    return os.path.isdir(path)


@contextmanager
def writing(path: str | Path, partial: Path | None = None) -> Iterator[None]:
    """Within, an OSError becomes a WriteError that names ``path``, whose unfinished content lies in ``partial``.

    Raises:
        WriteError: no file system can hold such a name, or what is done inside fails.
    """
    _check_name(path)
    try:
        yield
    except WriteError as error:
        if partial is None or str(partial) not in str(error):
            raise
        raise WriteError(str(error).replace(str(partial), str(path))) from error
    except EditingError:
        raise
    except OSError as error:
        raise _failed(path, error, partial) from error


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file yet to be made, of the same name in a folder of its own; it takes ``path``'s place if nothing raises.

    The file gets the permissions that the process's umask gives any new file; folders above it are made. What a
    process that was killed left unfinished in ``path``'s folder is removed first.

    Raises:
        WriteError: the file can't be written; what was there is as it was.
    """
    path = Path(path)
    with writing(path):
        make_folder(path.parent)
        with partial_folder(path) as folder, writing(path, folder / path.name):
            partial = folder / path.name
            yield partial
            partial.chmod(0o666 & ~_umask())
            os.replace(partial, path)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder yet to be filled, beside ``path``; it takes its place, flushed to the disk, if nothing raises inside.

    Raises:
        WriteError: it can't be written, or something is there already; that is as it was.
    """
    path = Path(path)
    with writing(path):
        make_folder(path.parent)
        with partial_folder(path) as folder, writing(path, folder / path.name):
            partial = folder / path.name
            partial.mkdir()
            yield partial
            partial.chmod(0o777 & ~_umask())
            flush_folder(partial)
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            os.rename(partial, path)
            flush(path.parent)


@contextmanager
def filled_folder(path: str | Path) -> Iterator[Path]:
    """A folder yet to be filled; if nothing raises inside, each of its files takes its place in ``path``.

    Files of the same names are replaced, others stay. Where there is no ``path``, this is `new_folder`.

    Raises:
        WriteError: it can't be written. Files that were there are as they were, unless the system stops halfway through
            giving the new ones their names; each is whole even then.
    """
    path = Path(path)
    if not os.path.lexists(path):
        with new_folder(path) as partial:
            yield partial
        return
    with writing(path), partial_folder(path / path.name) as folder, writing(path, folder / path.name):
        partial = folder / path.name
        partial.mkdir()
        yield partial
        flush_folder(partial)
        for file in sorted(file for file in partial.rglob("*") if file.is_file()):
            place = make_folder((path / file.relative_to(partial)).parent) / file.name
            file.chmod(0o666 & ~_umask())
            os.replace(file, place)


def write_text(path: str | Path, text: str) -> Path:
    """Write a text in UTF-8, in full or not at all; the path.

    Raises:
        WriteError: it can't be written; what was there is as it was.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(path)


def make_folder(path: str | Path) -> Path:
    """A folder, made with those above it where it is not there.

    Raises:
        WriteError: it can't be made.
    """
    with writing(path):
        os.makedirs(path, exist_ok=True)
    return Path(path)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder where the system keeps what is temporary; gone afterwards.

    Raises:
        WriteError: there is no such place.
    """
    with writing("A temporary folder (TMPDIR)"):
        made = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with made as name:
        yield Path(name)


def check_writable(path: str | Path) -> None:
    """Refuse, before anything is computed, a path under which nothing can be written; nothing is made.

    Raises:
        WriteError: an impossible name, no permission, or a file where a folder should be.
    """
    with writing(path):
        path = Path(path).absolute()
        with suppress(FileNotFoundError):
            os.lstat(path)
        above = next(parent for parent in path.parents if os.path.lexists(parent))
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(above))
        if not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(above))


def check_readable(path: str | Path, error: type[Exception]) -> None:
    """Refuse a path that is no file.

    Raises:
        ``error``: nothing is there, or a folder, or something that this user may not look at.
    """
    try:
        is_file = stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError as cause:
        raise error(f"{path} does not exist.") from cause
    except (OSError, ValueError) as cause:
        reason = cause.strerror if isinstance(cause, OSError) else "no file can have this name"
        raise error(f"{str(path)!r} can't be read: {reason}.") from cause
    if not is_file:
        raise error(f"{path} can't be read: it is {'a folder' if os.path.isdir(path) else 'no file'}.")


def discard(path: Path) -> None:
    """Delete a file that is of no more use; where that can't be done, it stays, and the log says so."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.info("%s is of no more use, and could not be deleted: %s", path, error)


def flush_folder(folder: Path) -> None:
    """Have the system write all files of a folder to the disk."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _check_name(path: str | Path) -> None:
    try:
        impossible = b"\0" in os.fsencode(path)
    except UnicodeEncodeError:
        impossible = True
    if impossible:
        raise WriteError(f"{str(path)!r} can't be written: no file can have this name. Choose another one.")


def _failed(path: str | Path, error: OSError, partial: Path | None) -> WriteError:
    """The error for one of the system; it names the file that was at fault where that is another."""
    reason = error.strerror or str(error)
    if isinstance(error.filename, (str, os.PathLike)):
        culprit = os.fspath(error.filename)
        culprit = culprit if partial is None else culprit.replace(str(partial), str(path))
        if culprit != str(path) and MARK not in culprit:
            reason += f" ({culprit})"
    advice = _ADVICE.get(error.errno or 0, _OTHERWISE)
    return WriteError(f"{path} can't be written: {reason}. {advice}; what was there before is as it was.")
