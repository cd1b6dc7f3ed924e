from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from easyedit_moe.errors import CacheError, DataError
from easyedit_moe.storage.strict_json import finite, json_text, read_json, write_json
from easyedit_moe.storage.tensors import read_safetensors, write_safetensors

ROOT = Path(__file__).parents[2]


def strictly(text: str) -> object:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_not_finite_becomes_null() -> None:
    value = {"a": math.nan, "b": [1.5, math.inf, (-math.inf, 2)], "c": {"d": float("nan")}, "e": "NaN", "f": True}
    assert strictly(json_text(value)) == {
        "a": None,
        "b": [1.5, None, [None, 2]],
        "c": {"d": None},
        "e": "NaN",
        "f": True,
    }
    assert finite(value)["f"] is True
    assert "\n" not in json_text(value, indent=None)


def test_letters_stay_and_numbers_come_back(tmp_path: Path) -> None:
    value = {"name": "東京 é", "number": 0.1 + 0.2, "tiny": 5e-324}
    path = write_json(tmp_path / "new" / "x.json", value)
    assert "東京" in path.read_text(encoding="utf-8")
    assert read_json(path) == value


def test_a_file_is_written_in_full_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": {2, 3}})
    assert read_json(tmp_path / "x.json") == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_unreadable_files_are_errors_of_ours(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text('{"a": ')
    (tmp_path / "mark.json").write_text("\ufeff[1]", encoding="utf-8")
    assert read_json(tmp_path / "mark.json") == [1]
    for path in (tmp_path / "half.json", tmp_path / "none.json", tmp_path):
        with pytest.raises(DataError, match=r"can't be read|does not exist"):
            read_json(path)
    with pytest.raises(CacheError):
        read_json(tmp_path / "none.json", CacheError)


def test_metadata_of_tensors_is_strict_too(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(2)}, {"loss": math.nan})
    assert b"NaN" not in (tmp_path / "x.safetensors").read_bytes()
    assert read_safetensors(tmp_path / "x.safetensors", CacheError, "again")[1] == {"loss": None}


@pytest.mark.parametrize(
    "path",
    [*(ROOT / "docs").glob("*.json"), *(ROOT / "benchmarks" / "results").glob("*.json"),
     *(ROOT / "easyedit_moe").rglob("*.json")],
    ids=lambda path: path.name,
)  # fmt: skip
def test_committed_files_are_strict(path: Path) -> None:
    strictly(path.read_text(encoding="utf-8"))


def test_lists_of_numbers_stay_on_one_line() -> None:
    value = {"a": [1, -2.5, None, 1e-9], "b": ["x", "[\n 1,\n 2\n]"], "c": [[1, 2], [3]], "d": [], "e": [{"f": [0.1]}]}
    text = json_text(value)
    assert '"a": [1, -2.5, null, 1e-09]' in text
    assert json.loads(text) == value
