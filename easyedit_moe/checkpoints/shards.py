"""The safetensors files of a checkpoint folder: where each tensor lies, read and written at its place.

Nothing is mapped into memory: a read takes the bytes of what it returns, a write changes just these in the file.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from easyedit_moe.errors import CheckpointError
from easyedit_moe.storage.strict_json import parse_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        name: in the checkpoint.
        file: name of the file within the folder.
        kind: safetensors' name of the dtype, such as "BF16".
        shape: of the tensor, row by row in the file.
        start, size: first byte in the file, and number of bytes.
    """

    name: str
    file: str
    kind: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def dtype(self) -> torch.dtype:
        """As torch names it; CheckpointError for one that torch lacks."""
        if self.kind not in DTYPES:
            raise CheckpointError(f"{self.name} is stored as {self.kind}, which this package can't read.")
        return DTYPES[self.kind]


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Entries of a safetensors file, ``__metadata__`` included, and the byte at which its data begin.

    Raises:
        CheckpointError: the file is missing, truncated or no safetensors file.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = parse_json(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} can't be read as safetensors: {error}. Get the file anew.") from error
    if path.stat().st_size != 8 + length + max(ends, default=0):
        raise CheckpointError(f"{path} is truncated or has bytes too many. Get the file anew.")
    return header, 8 + length


class Checkpoint:
    """Tensors of several safetensors files.

    Args:
        files: path of each file, by its name within the folder.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = dict(files)
        self.tensors: dict[str, StoredTensor] = {}
        for file, path in self.files.items():
            header, base = read_header(path)
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                start, end = entry["data_offsets"]
                shape = tuple(entry["shape"])
                self.tensors[name] = StoredTensor(name, file, entry["dtype"], shape, base + start, end - start)

    @staticmethod
    def of_folder(folder: Path) -> Checkpoint:
        """The checkpoint in a folder.

        Raises:
            CheckpointError: no such folder, no safetensors in it, or a file that its index names is missing or broken.
        """
        return Checkpoint({file: folder / file for file in weight_files(folder)})

    def read(self, name: str, row: int | range | None = None) -> Tensor:
        """A tensor, or one entry or neighbouring ones of its first dimension, as a new tensor."""
        entry = self.tensors[name]
        shape, start, size = _part(entry, row)
        data = np.fromfile(self.files[entry.file], dtype=np.uint8, count=size, offset=start)
        return torch.from_numpy(data).view(entry.dtype).view(shape)

    def write(self, name: str, value: Tensor, row: int | range | None = None) -> None:
        """Overwrite what `read` returns in its file; shape and dtype must be the same."""
        entry = self.tensors[name]
        shape, start, _ = _part(entry, row)
        if tuple(value.shape) != shape or value.dtype != entry.dtype:
            raise CheckpointError(
                f"{name} is stored as {shape} of {entry.dtype}; can't write {tuple(value.shape)} of {value.dtype}."
            )
        with self.files[entry.file].open("r+b") as file:
            file.seek(start)
            file.write(as_bytes(value))


def as_bytes(value: Tensor) -> memoryview:
    """The bytes of a tensor, row by row."""
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that make up the checkpoint in a folder.

    Raises:
        CheckpointError: there is none.
    """
    index = folder / INDEX
    if os.path.isfile(folder / SINGLE):
        return [SINGLE]
    if os.path.isfile(index):
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise CheckpointError(f"{index} has no weight_map, or one that names no files. Get the file anew.")
        return sorted(set(places.values()))
    raise CheckpointError(
        f"{folder} holds neither {SINGLE} nor {INDEX}. Give the folder of a checkpoint in safetensors; another format "
        "(.bin, .gguf) is converted by loading it with transformers and saving it."
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; CheckpointError where the file is missing or holds none."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return content


@dataclass(frozen=True)
class Added:
    """A tensor that is written into a new file one entry of its first dimension after the other.

    Attributes:
        shape, dtype: of the whole tensor.
        entry: gives the i-th entry.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    entry: Callable[[int], Tensor]


def replace_tensors(source: Path, target: Path, without: Iterable[str], added: Mapping[str, Added]) -> None:
    """A new safetensors file: the tensors of ``source`` except some, byte by byte, and some more after them.

    Metadata are kept; one entry of one tensor at a time is in memory.
    """
    header, base = read_header(source)
    gone = set(without)
    kept = {name: entry for name, entry in header.items() if name != "__metadata__" and name not in gone}
    fresh: dict[str, Any] = {"__metadata__": header["__metadata__"]} if "__metadata__" in header else {}
    end = 0
    for name, entry in sorted(kept.items(), key=lambda item: item[1]["data_offsets"][0]):
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        fresh[name] = {**entry, "data_offsets": [end, end + size]}
        end += size
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    for name, value in added.items():
        size = math.prod(value.shape) * value.dtype.itemsize
        fresh[name] = {"dtype": kinds[value.dtype], "shape": list(value.shape), "data_offsets": [end, end + size]}
        end += size
    with source.open("rb") as old, target.open("wb") as new:
        _write_header(new, fresh)
        for entry in sorted(kept.values(), key=lambda entry: entry["data_offsets"][0]):
            _copy_range(old, new, base + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for value in added.values():
            for row in range(value.shape[0]):
                new.write(as_bytes(value.entry(row)))


def _write_header(file: BinaryIO, header: Mapping[str, Any]) -> None:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the data to eight bytes
    file.write(struct.pack("<Q", len(text)) + text)


def _copy_range(old: BinaryIO, new: BinaryIO, start: int, size: int, chunk: int = 2**24) -> None:
    old.seek(start)
    while size:
        data = old.read(min(chunk, size))
        if not data:
            raise CheckpointError("A checkpoint file became shorter while it was copied.")
        new.write(data)
        size -= len(data)


def _part(entry: StoredTensor, row: int | range | None) -> tuple[tuple[int, ...], int, int]:
    """Shape, first byte and bytes of a tensor, or of one entry or neighbouring ones of its first dimension."""
    if row is None:
        return entry.shape, entry.start, entry.size
    shape = entry.shape[1:]
    size = math.prod(shape) * entry.dtype.itemsize
    if isinstance(row, range):
        return (len(row), *shape), entry.start + row.start * size, len(row) * size
    return shape, entry.start + row * size, size
