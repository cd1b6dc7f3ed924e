"""Tensors on disk: safetensors under a key that says what they are of; written atomically, verified when read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from easyedit_moe.errors import CacheError
from easyedit_moe.storage.files import replacing
from easyedit_moe.storage.strict_json import finite

SCHEMA = 1


def check_key(
    path: Path, metadata: Mapping[str, Any], kind: str, name: str, key: Mapping[str, Any], advice: str
) -> None:
    """Refuse a file of another kind, or one whose key is not ``key``; ``name`` is what people call the kind.

    Raises:
        CacheError: it is not a file of this kind and schema, or was made for another model or setting.
    """
    found = metadata.get("key")
    if metadata.get("kind") != kind or metadata.get("schema") != SCHEMA or not isinstance(found, dict):
        raise CacheError(f"{path} is not a {name} of schema {SCHEMA}; {advice}.")
    wanted = json.loads(json.dumps(key))  # as the file has it: lists for tuples
    differing = [f"{k}: expected {v!r}, found {found.get(k)!r}" for k, v in wanted.items() if found.get(k) != v]
    if differing:
        raise CacheError(
            f"{path} was made for another model or setting ({'; '.join(differing)}). Delete it, or use another "
            "stats_dir."
        )


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file in full or not at all; ``metadata`` must be JSON and is kept under one entry."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as partial:
        save_file(
            ready, partial, metadata={"easyedit_moe": json.dumps(finite(metadata), sort_keys=True, allow_nan=False)}
        )


def read_safetensors(path: Path, error: type[Exception], advice: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file of ours.

    Raises:
        ``error``: the file is missing, truncated, corrupt or not ours.
    """
    with _opened(path, error, advice) as file:
        return {name: file.get_tensor(name) for name in list(file.keys())}, _metadata(file)


def read_metadata(path: Path, error: type[Exception], advice: str) -> dict[str, Any]:
    """As `read_safetensors`, the metadata alone."""
    with _opened(path, error, advice) as file:
        return _metadata(file)


@contextmanager
def _opened(path: Path, error: type[Exception], advice: str) -> Iterator[Any]:
    if not path.is_file():
        raise error(f"{path} does not exist.")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, ValueError, KeyError, OSError) as cause:
        raise error(f"{path} is truncated, corrupt or not of this package ({cause}); {advice}.") from cause


def _metadata(file: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((file.metadata() or {})["easyedit_moe"])
    return found


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
