"""Tensors on disk: safetensors under a key that says what they are of; written atomically, verified when read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from easyedit_moe.errors import CacheError, DamagedCacheError, EditingWarning
from easyedit_moe.storage.checksums import checksum
from easyedit_moe.storage.files import check_readable, replacing
from easyedit_moe.storage.strict_json import digest, finite

SCHEMA = 1
_Read = TypeVar("_Read")
_ENTRY, _CONTENTS = "easyedit_moe", "contents"


def check_key(
    path: Path, metadata: Mapping[str, Any], kind: str, name: str, key: Mapping[str, Any], advice: str
) -> None:
    """Refuse a file of another kind, or one whose key is not ``key``; ``name`` is what people call the kind.

    Raises:
        DamagedCacheError: it is not a file of this kind and schema. CacheError: it was made for another model or
            setting.
    """
    found, schema = metadata.get("key"), metadata.get("schema")
    if metadata.get("kind") != kind or type(schema) is not int or schema != SCHEMA or not isinstance(found, dict):
        raise DamagedCacheError(f"{path} is not a {name} of schema {SCHEMA}; {advice}.")
    wanted = json.loads(json.dumps(key))  # as the file has it: lists for tuples
    differing = [
        f"{k}: expected {wanted.get(k)!r}, found {found.get(k)!r}"
        for k in {**wanted, **found}
        if k not in found or k not in wanted or json.dumps(found[k]) != json.dumps(wanted[k])
    ]
    if differing:
        raise CacheError(
            f"{path} was made for another model or setting ({'; '.join(differing)}). Delete it, or use another "
            "stats_dir."
        )


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file in full or not at all; ``metadata`` must be JSON and is kept under one entry.

    The file says what it holds: a digest of the tensors' names, dtypes, shapes and bits stands in the metadata, and one
    of the metadata before it, so that a changed byte is noticed wherever it is. Equal content gives equal files.

    Raises:
        WriteError: it can't be written; what was there is as it was.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = {**finite(metadata), _CONTENTS: _contents(ready)}
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    write_tensors(path, ready, {_ENTRY: f"{_text_digest(text)} {text}"})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that others read, in full or not at all; ``metadata`` as it is, no digest.

    Raises:
        WriteError: it can't be written; what was there is as it was.
    """
    with replacing(path) as partial, system_errors():
        save_file(dict(tensors), partial, metadata=dict(metadata))


def write_torch(path: Path, value: Tensor) -> None:
    """Write a tensor as ``torch.load`` reads it, in full or not at all: the format of EasyEdit's own files, no other.

    The file holds a pickle, which this package never reads; ``torch.load`` reads a tensor without running any of it.

    Raises:
        WriteError: it can't be written; what was there is as it was.
    """
    with replacing(path) as partial, system_errors():
        torch.save(value, partial)


@contextmanager
def system_errors() -> Iterator[None]:
    """Errors of the system, which safetensors and torch report as their own while they write, as an OSError again."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        number = re.search(r"os error (\d+)", str(error))
        if number:
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise OSError(str(error)) from error


def read_safetensors(path: Path, error: type[Exception], advice: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file of ours; copies, so that nothing that happens to the file later reaches them.

    Raises:
        ``error``: the file is missing, truncated, not ours, or holds other bits than were written.
    """
    with _opened(path, error, advice) as file:
        metadata = _metadata(file)
        tensors = {name: file.get_tensor(name).clone() for name in list(file.keys())}
        expected = metadata.pop(_CONTENTS, None)
        # Earlier versions wrote no digest; such files are read as they are.
        if expected is not None and expected != _contents(tensors):
            raise ValueError("its tensors are not those that were written")
        return tensors, metadata


def read_or_warn(path: Path, read: Callable[[Path], _Read]) -> _Read | None:
    """What ``read`` gives of a file; None where there is none, and, with an EditingWarning, where it is damaged: its
    content is then made anew.
    """
    if not os.path.exists(path):
        return None
    try:
        return read(path)
    except DamagedCacheError as error:
        warnings.warn(f"{error} It is made anew now.", EditingWarning, stacklevel=3)
        return None


def read_metadata(path: Path, error: type[Exception], advice: str) -> dict[str, Any]:
    """As `read_safetensors`, the metadata alone."""
    with _opened(path, error, advice) as file:
        metadata = _metadata(file)
        metadata.pop(_CONTENTS, None)
        return metadata


@contextmanager
def _opened(path: Path, error: type[Exception], advice: str) -> Iterator[Any]:
    check_readable(path, error)
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, ValueError, KeyError, OSError, RecursionError) as cause:
        raise error(f"{path} is truncated, corrupt or not of this package ({cause}); {advice}.") from cause


def _metadata(file: Any) -> dict[str, Any]:
    text = (file.metadata() or {})[_ENTRY]
    told = ""
    if not text.startswith("{"):  # earlier versions wrote no digest
        told, _, text = text.partition(" ")
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("its metadata is no mapping")
    if (told or _CONTENTS in found) and told != _text_digest(text):
        raise ValueError("its metadata is not what was written")
    return found


def _contents(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bits; the bits go through `checksum`, which is as fast as memory is read."""
    rows = [[name, str(t.dtype), list(t.shape), checksum(_bits(t))] for name, t in sorted(tensors.items())]
    return digest(rows)[:32]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
