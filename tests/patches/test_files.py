from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planted_patches import new_values, write, write_tensors
from solving_editors import hparams
from tiny import assert_same_state, facts, state_of, tiny_model, tiny_tokenizer

from easyedit_moe.adapters.moe_adapter import AdapterConfig, MoEAdapter
from easyedit_moe.editors import make_editor
from easyedit_moe.errors import PatchError
from easyedit_moe.patches.files import load_patch
from easyedit_moe.patches.tensors import TensorPatch
from easyedit_moe.patches.weights import WeightPatch
from easyedit_moe.storage.tensors import read_safetensors, write_safetensors


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


@pytest.mark.parametrize("method", ["Global+speedup", "BCD+speedup"])
def test_a_solution_that_is_spread_is_stored_once(method: str, data: Path) -> None:
    """Layers get shares of one solution, so their right factors are one; a file of schema 2 had a copy per layer."""
    model, sizes = tiny_model(), []
    hp = hparams(data, method, layers=[0, 1, 2], metric="identity", v_num_grad_steps=1)
    patch = make_editor(hp, progress=False).edit(model, tiny_tokenizer(), facts(3)).patch
    assert len({id(right) for _, update in patch.steps for right in update.right}) == len(patch.steps[0][1].right)
    patch.save(data / "shared.safetensors")
    patch.steps = [(n, replace(u, right=tuple(r.clone() for r in u.right))) for n, u in patch.steps]
    patch.save(data / "apart.safetensors")
    for name in ("shared", "apart"):
        tensors, metadata = read_safetensors(data / f"{name}.safetensors", PatchError, "")
        sizes.append(sum(t.numel() for key, t in tensors.items() if key.endswith(".right")))
        loaded, fresh = WeightPatch.load(data / f"{name}.safetensors"), tiny_model()
        loaded.apply(fresh)
        assert_same_state(state_of(model), state_of(fresh))
    assert sizes[1] == 3 * sizes[0]
    assert metadata["schema"] == 4
    metadata["schema"] = 2
    write_safetensors(data / "old.safetensors", tensors, metadata)
    assert WeightPatch.load(data / "old.safetensors").id == patch.id
