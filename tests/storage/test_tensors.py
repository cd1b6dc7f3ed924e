"""Files of tensors: any changed byte is noticed, older files are read, and what was read is the reader's own."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from easyedit_moe.errors import CacheError
from easyedit_moe.storage.tensors import read_metadata, read_safetensors, write_safetensors

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.tensor([1, -2, 3]),
    "c": torch.tensor([True, False]),
    "d": torch.ones(5, dtype=torch.bfloat16),
    "e": torch.zeros(0, 2),
    "f": torch.tensor(2.5, dtype=torch.float64),
    "g": torch.arange(7, dtype=torch.uint8),
}
METADATA = {"kind": "test", "schema": 1, "key": {"model": "m", "n": [1, 2.5, None]}}


def same(found: dict[str, torch.Tensor], metadata: dict[str, object]) -> bool:
    if found.keys() != TENSORS.keys() or metadata != METADATA:
        return False
    return all(t.dtype == found[n].dtype and torch.equal(t, found[n]) for n, t in TENSORS.items())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_safetensors(tmp_path / "file.safetensors", TENSORS, METADATA)
    return tmp_path / "file.safetensors"


def test_what_was_written_is_read(path: Path) -> None:
    assert same(*read_safetensors(path, CacheError, "advice"))
    assert read_metadata(path, CacheError, "advice") == METADATA


@pytest.mark.parametrize("way", ["flipped bit", "other byte", "zero"])
def test_every_changed_byte_is_noticed(way: str, path: Path) -> None:
    whole = path.read_bytes()
    draw, noticed = random.Random(0), 0
    for place in range(len(whole)):
        changed = {"flipped bit": whole[place] ^ (1 << draw.randrange(8)), "other byte": draw.randrange(256), "zero": 0}
        if changed[way] == whole[place]:
            continue
        path.write_bytes(whole[:place] + bytes([changed[way]]) + whole[place + 1 :])
        try:
            found = read_safetensors(path, CacheError, "advice")
        except CacheError:
            noticed += 1
        else:
            # White space at the end of the header means nothing.
            assert same(*found), f"byte {place} went unnoticed"
    assert noticed > 0.9 * len(whole) / (2 if way == "zero" else 1)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -1])
def test_a_file_that_is_cut_off_is_refused(length: int, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CacheError, match="advice"):
        read_safetensors(path, CacheError, "advice")


def test_what_was_read_does_not_hang_on_the_file(path: Path) -> None:
    found = read_safetensors(path, CacheError, "advice")
    path.write_bytes(b"\x01" * path.stat().st_size)
    assert same(*found)
    path.write_bytes(b"")
    assert same(*found)


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    save_file(TENSORS, path, metadata={"easyedit_moe": json.dumps(METADATA)})
    assert same(*read_safetensors(path, CacheError, "advice"))


@pytest.mark.parametrize("metadata", [None, {}, {"easyedit_moe": "3"}, {"easyedit_moe": "[1]"}, {"easyedit_moe": "{"},
                                      {"easyedit_moe": "0 {}"},
                                      {"easyedit_moe": json.dumps({"contents": "0"})}])  # fmt: skip
def test_metadata_that_is_none_of_ours(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file(TENSORS, path, metadata=metadata)
    for read in (read_safetensors, read_metadata):
        if metadata and "contents" in metadata.get("easyedit_moe", "") and read is read_metadata:
            continue
        with pytest.raises(CacheError, match="advice"):
            read(path, CacheError, "advice")
