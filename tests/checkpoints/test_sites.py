"""Patches of shared experts, dense FFNs and experts in one matrix (DBRX), on checkpoint folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from edited_folders import assert_same_folder, edited, files_of, logits, model_of, saved
from torch import Tensor, nn

from benchmarks.family_models import tiny_model as family_model
from easyedit_moe.checkpoints.apply import apply_patch
from easyedit_moe.checkpoints.history import EDITS, read_history
from easyedit_moe.checkpoints.naming import Piece, read_parameter, row_tensors, write_parameter
from easyedit_moe.checkpoints.revert import revert_patch
from easyedit_moe.checkpoints.saving import save_edited
from easyedit_moe.checkpoints.shards import Checkpoint
from easyedit_moe.errors import AlreadyAppliedError, CheckpointError, PatchError
from easyedit_moe.hparams.sites import DENSE, EXPERTS, SHARED_EXPERT
from easyedit_moe.moe.loading import load_model
from easyedit_moe.patches.files import load_patch
from easyedit_moe.patches.merging import merge
from easyedit_moe.patches.weights import WeightPatch
from easyedit_moe.storage.tensors import write_safetensors

CASES = {
    "qwen2_moe": (SHARED_EXPERT, (1, 2), "mlp.shared_expert.down_proj.weight"),
    "multimodal qwen3_5_moe": (SHARED_EXPERT, (1, 2), "mlp.shared_expert.down_proj.weight"),
    "deepseek_v3": (SHARED_EXPERT, (1, 2), "mlp.shared_experts.down_proj.weight"),
    "glm4_moe": (DENSE, (0,), "mlp.down_proj.weight"),
    "lfm2_moe": (DENSE, (0,), "feed_forward.w2.weight"),
    "granitemoeshared": (SHARED_EXPERT, (1, 2), "shared_mlp.output_linear.weight"),
    "dbrx": (EXPERTS, (1, 2), "ffn.experts.mlp.w2"),
}


def built(family: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    other = family in ("lfm2_moe", "granitemoeshared", "dbrx")
    return family_model(family, dtype=dtype) if other else model_of(family, dtype)


def loaded(folder: Path) -> nn.Module:
    return load_model(str(folder), "bfloat16")[0]


def changed_tensors(before: Path, after: Path) -> set[str]:
    old, new = Checkpoint.of_folder(before), Checkpoint.of_folder(after)
    assert old.tensors.keys() == new.tensors.keys()
    return {name for name in old.tensors if not torch.equal(old.read(name), new.read(name))}


@pytest.mark.parametrize("originals", [False, True])
@pytest.mark.parametrize("family", CASES)
def test_apply_and_revert(family: str, originals: bool, tmp_path: Path) -> None:
    site, layers, ending = CASES[family]
    source = saved(tmp_path / "source", built(family), "60KB")
    original, model = files_of(source), loaded(source)
    edited(model, layers, site=site).save(tmp_path / "patch.safetensors", keep_originals=originals)
    patch = load_patch(tmp_path / "patch.safetensors")
    out = apply_patch(patch, source, tmp_path / "out")
    assert files_of(source) == original
    assert torch.equal(logits(loaded(out)), logits(model))
    changed = changed_tensors(source, out)
    assert len(changed) == len(layers)
    assert all(name.endswith(ending) for name in changed)
    assert [edit.id for edit in read_history(out)] == [patch.id]
    with pytest.raises(AlreadyAppliedError):
        apply_patch(patch, out, tmp_path / "twice")
    assert_same_folder(revert_patch(patch, out, tmp_path / "back", None if originals else source), source)


@pytest.mark.parametrize("family", ["qwen2_moe", "glm4_moe", "dbrx"])
def test_patches_that_follow_each_other_and_their_merger(family: str, tmp_path: Path) -> None:
    site, layers, _ = CASES[family]
    source = saved(tmp_path / "source", built(family))
    model = loaded(source)
    first = edited(model, layers, site=site)
    second = edited(model, layers, seed=1, parent=first.id, site=site)
    both = apply_patch(second, apply_patch(first, source, tmp_path / "one"), tmp_path / "two")
    assert torch.equal(logits(loaded(both)), logits(model))
    merged = apply_patch(merge([first, second]), source, tmp_path / "merged")
    assert changed_tensors(both, merged) == set()
    with pytest.raises(PatchError, match=second.id):
        revert_patch(first, both, tmp_path / "no", source)
    back = revert_patch(second, both, tmp_path / "back", tmp_path / "one")
    assert_same_folder(back, tmp_path / "one")
    if family == "dbrx":
        other = WeightPatch.concat([first, second])
        assert other.id == merge([first, second]).id


@pytest.mark.parametrize("family", ["deepseek_v3", "dbrx"])
def test_in_place_and_saved_from_memory(family: str, tmp_path: Path) -> None:
    site, layers, _ = CASES[family]
    source = saved(tmp_path / "source", built(family))
    pristine = saved(tmp_path / "pristine", built(family))
    model, tok = load_model(str(source), "bfloat16")
    patch = edited(model, layers, site=site)
    stored = save_edited(model, tok, tmp_path / "stored", source)
    apply_patch(patch, source, in_place=True)
    assert changed_tensors(stored, source) == set()
    revert_patch(patch, source, tmp_path / "back")  # from the backup
    assert changed_tensors(tmp_path / "back", pristine) == set()


def test_a_patch_of_a_site_and_one_of_the_experts_on_one_checkpoint(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", built("deepseek_v3"))
    model = loaded(source)
    shared = edited(model, site=SHARED_EXPERT)
    routed = edited(model, parent=shared.id)
    both = apply_patch(routed, apply_patch(shared, source, tmp_path / "one"), tmp_path / "two")
    assert torch.equal(logits(loaded(both)), logits(model))
    # They share no matrix, so either goes first.
    only = revert_patch(shared, both, tmp_path / "only", source)
    assert len(changed_tensors(source, only)) == len(routed.before) * len(routed.before[1])
    back = revert_patch(routed, only, tmp_path / "back", source)
    assert changed_tensors(source, back) == set()
    assert not (back / EDITS).exists()


def test_a_patch_on_another_model_names_what_is_missing(tmp_path: Path) -> None:
    model = built("deepseek_v3")
    patch = edited(model, (1,), site=SHARED_EXPERT)
    source = saved(tmp_path / "source", built("glm4_moe"))
    with pytest.raises(PatchError, match=r"holds updates of|does not hold"):
        apply_patch(patch, source, tmp_path / "out")
    dense = saved(tmp_path / "mixtral", built("mixtral"))
    with pytest.raises(PatchError, match="layer 1"):
        apply_patch(patch, dense, tmp_path / "out")


def test_rows_are_read_and_written_across_pieces(tmp_path: Path) -> None:
    whole = torch.arange(60.0).reshape(12, 5)
    write_safetensors(tmp_path / "a.safetensors", {"upper": whole[:7].clone(), "lower": whole[7:].clone()}, {})
    checkpoint = Checkpoint({"a.safetensors": tmp_path / "a.safetensors"})
    pieces = [Piece("upper", (7, 5), (0, 0), (0, 1)), Piece("lower", (5, 5), (7, 0), (0, 1))]

    def read(rows: range) -> Tensor:
        return read_parameter(checkpoint, pieces, (12, 5), rows)

    for rows in (range(0, 4), range(4, 8), range(8, 12), range(0, 12)):
        assert torch.equal(read(rows), whole[rows.start : rows.stop])
    assert row_tensors(pieces, range(4, 8)) == ["upper", "lower"]
    assert row_tensors(pieces, range(8, 12)) == ["lower"]
    write_parameter(checkpoint, pieces, -whole[4:8], range(4, 8))
    assert torch.equal(read(range(0, 12)), torch.cat([whole[:4], -whole[4:8], whole[8:]]))
    turned = [Piece("upper", (7, 5), (0, 0), (1, 0))]
    with pytest.raises(CheckpointError, match="one after the other"):
        row_tensors(turned, range(2))
