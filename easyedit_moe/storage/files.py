"""Files that appear in full or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from easyedit_moe.errors import shown


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
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` with the same ending; it takes ``path``'s place if nothing raises inside.

    The file gets the permissions that the process's umask gives any new file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.partial-", suffix=path.suffix)
    os.close(descriptor)
    partial = Path(name)
    try:
        yield partial
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
