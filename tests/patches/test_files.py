from __future__ import annotations

from pathlib import Path

import pytest
import torch
from planted_patches import new_values, write, write_tensors
from tiny import tiny_model

from easyedit_moe.adapters.moe_adapter import AdapterConfig, MoEAdapter
from easyedit_moe.errors import PatchError
from easyedit_moe.patches.files import load_patch
from easyedit_moe.patches.tensors import TensorPatch
from easyedit_moe.patches.weights import WeightPatch
from easyedit_moe.storage.tensors import write_safetensors


def test_each_kind_is_recognised(tmp_path: Path) -> None:
    model = tiny_model()
    write(model).save(tmp_path / "w.safetensors")
    write_tensors(model, new_values(model)).save(tmp_path / "t.safetensors")
    assert isinstance(load_patch(tmp_path / "w.safetensors"), WeightPatch)
    assert isinstance(load_patch(str(tmp_path / "t.safetensors")), TensorPatch)


def test_adapters_are_told_from_patches(tmp_path: Path) -> None:
    adapter = MoEAdapter(AdapterConfig(1, 8, 2, 4, 1, 1.0, 0.0, 1.0, True, "skip", "f"))
    adapter.save(tmp_path / "folder")
    adapter.save(tmp_path / "adapter.safetensors")
    for path in (tmp_path / "folder", tmp_path / "adapter.safetensors"):
        with pytest.raises(PatchError, match=r"adapter of MEMoE.*MoEAdapter\.load"):
            load_patch(path)


def test_what_is_no_patch(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "other.safetensors", {"x": torch.zeros(1)}, {"kind": "moments", "schema": 1})
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("nonsense")
    for name, message in (
        ("other.safetensors", "is not a patch of schema 2"),
        ("empty", "is a folder"),
        ("text.safetensors", "truncated, corrupt or not of this package"),
        ("missing", "does not exist"),
    ):
        with pytest.raises(PatchError, match=message):
            load_patch(tmp_path / name)
