from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from edited_folders import EXPERTS, assert_same_folder, edited, files_of, logits, model_of, saved
from quantised import to_fp8, to_mxfp4
from safetensors.torch import load_file
from torch import Tensor, nn

from easyedit_moe.checkpoints import staging
from easyedit_moe.checkpoints.apply import apply_patch
from easyedit_moe.checkpoints.history import EDITS, read_history
from easyedit_moe.checkpoints.revert import revert_patch
from easyedit_moe.checkpoints.shards import read_header
from easyedit_moe.errors import AlreadyAppliedError, CheckpointError, NumericalError, PatchError
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.loading import load_model
from easyedit_moe.patches.files import load_patch
from easyedit_moe.patches.tensors import TensorPatch, writing_tensors
from easyedit_moe.patches.weights import WeightPatch

FAMILIES = ("qwen3_moe", "gpt_oss", "mixtral", "qwen3_5_moe", "old_style", "multimodal qwen3_vl_moe", "omni")


def loaded(folder: Path, dtype: str = "bfloat16") -> nn.Module:
    return load_model(str(folder), dtype)[0]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def kept(patch: WeightPatch | TensorPatch, folder: Path, keep_originals: bool = False) -> WeightPatch | TensorPatch:
    """The patch as another process reads it."""
    patch.save(folder / "patch.safetensors", keep_originals=keep_originals)
    return load_patch(folder / "patch.safetensors")


def two_edits(tmp_path: Path) -> tuple[Path, WeightPatch, WeightPatch]:
    """A checkpoint, and two patches of which the second was made on top of the first."""
    source = saved(tmp_path / "source", model_of("qwen3_moe"))
    model = loaded(source)
    first = edited(model, (1, 2))
    return source, first, edited(model, (2, 3), seed=1, parent=first.id)


# ---------------------------------------------------------------- right


@pytest.mark.parametrize("originals", [False, True])
@pytest.mark.parametrize("shard", ["1GB", "120KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_apply_and_revert(family: str, shard: str, originals: bool, tmp_path: Path) -> None:
    source = saved(tmp_path / "source", model_of(family), shard)
    original = files_of(source)
    model = loaded(source)
    patch = kept(edited(model), tmp_path, originals)
    out = apply_patch(patch, source, tmp_path / "out")
    assert files_of(source) == original
    assert torch.equal(logits(loaded(out)), logits(model))
    weights = dict(loaded(out).named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    after = files_of(out)
    assert [edit.id for edit in read_history(out)] == [patch.id]
    assert after.keys() - original.keys() == {EDITS}
    changed = [name for name in original if after[name] != original[name]]
    assert changed
    for name in changed:
        assert name.endswith(".safetensors")
        assert read_header(source / name) == read_header(out / name)
    before, edited_tensors = tensors_of(source), tensors_of(out)
    differing = {name for name, tensor in before.items() if not torch.equal(tensor, edited_tensors[name])}
    assert all("experts" in name and (".1." in name or ".2." in name) for name in differing)
    with pytest.raises(AlreadyAppliedError):
        apply_patch(patch, out, tmp_path / "twice")
    base = None if originals else source
    assert_same_folder(revert_patch(patch, out, tmp_path / "back", base), source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "out", "patch.safetensors", "source"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes(dtype: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "source", model_of("qwen3_moe", getattr(torch, dtype)))
    model = loaded(source, dtype)
    out = apply_patch(edited(model), source, tmp_path / "out")
    assert torch.equal(logits(loaded(out, dtype)), logits(model))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_patches_of_whole_tensors(family: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "source", model_of(family), "120KB")
    model = loaded(source)
    names = ["model.layers.3.self_attn.q_proj.weight", "model.layers.1.mlp.experts.gate_up_proj", "lm_head.weight"]
    with writing_tensors(model) as writer:
        for name in names:
            writer.write(name, model.get_parameter(name).float() * 1.1)
        made = writer.finish({})
    patch = kept(made, tmp_path, True)
    out = apply_patch(patch, source, tmp_path / "out")
    assert torch.equal(logits(loaded(out)), logits(model))
    with pytest.raises(AlreadyAppliedError):
        apply_patch(patch, out, tmp_path / "twice")
    assert_same_folder(revert_patch(patch, out, tmp_path / "back"), source)
    patch.flips = {}
    assert_same_folder(revert_patch(patch, out, tmp_path / "again", source), source)


def test_a_chain(tmp_path: Path) -> None:
    source, first, second = two_edits(tmp_path)
    once = apply_patch(first, source, tmp_path / "once")
    twice = apply_patch(second, once, tmp_path / "twice")
    assert [(edit.id, edit.parent) for edit in read_history(twice)] == [(first.id, None), (second.id, first.id)]
    model = loaded(source)
    first.originals, second.originals = {}, {}
    first.apply(model)
    second.apply(model)
    assert torch.equal(logits(loaded(twice)), logits(model))
    assert_same_folder(revert_patch(second, twice, tmp_path / "back", once), once)


# ---------------------------------------------------------------- refused


def test_a_missing_parent_is_named(tmp_path: Path) -> None:
    source, first, second = two_edits(tmp_path)
    with pytest.raises(PatchError, match=rf"down_proj.*{second.id}.*patch {first.id}: apply that one first"):
        apply_patch(second, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_later_patch_must_go_first(tmp_path: Path) -> None:
    source, first, second = two_edits(tmp_path)
    twice = apply_patch(second, apply_patch(first, source, tmp_path / "once"), tmp_path / "twice")
    with pytest.raises(PatchError, match=rf"Revert the later patches {second.id} first"):
        revert_patch(first, twice, tmp_path / "back", source)
    with pytest.raises(PatchError, match="Is it applied"):
        revert_patch(first, source, tmp_path / "back", source)
    with pytest.raises(PatchError, match="does not hold the"):
        revert_patch(second, twice, tmp_path / "back", source)
    with pytest.raises(PatchError, match="pass base"):
        revert_patch(second, twice, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_other_weights_and_dtypes_are_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", model_of("qwen3_moe"))
    patch = edited(loaded(source))
    model = loaded(source)
    with torch.no_grad():
        MoELayerView(model).layers[2].experts.read(EXPERTS[1])[0, 0] += 1
    other = saved(tmp_path / "other", model)
    name = rf"model\.layers\.2\.mlp\.experts\.{EXPERTS[1]}\.down_proj\.weight"
    with pytest.raises(PatchError, match=name):
        apply_patch(patch, other, tmp_path / "out")
    wide = saved(tmp_path / "wide", model_of("qwen3_moe", torch.float32))
    with pytest.raises(PatchError, match="is stored as float32; the patch was made on a model in bfloat16"):
        apply_patch(patch, wide, tmp_path / "out")
    mixtral = saved(tmp_path / "mixtral", model_of("mixtral"))
    with pytest.raises(PatchError, match="does not hold the weights"):
        apply_patch(patch, mixtral, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixtral", "other", "source", "wide"]


def test_places_that_are_not_free(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", model_of("qwen3_moe"))
    patch = edited(loaded(source))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        apply_patch(patch, source, tmp_path / "full")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        apply_patch(patch, source, source)
    with pytest.raises(CheckpointError, match="lies within"):
        apply_patch(patch, source, source / "edited")
    for options in ({}, {"out": tmp_path / "out", "in_place": True}):
        with pytest.raises(CheckpointError, match="Give either"):
            apply_patch(patch, source, **options)
    (tmp_path / "empty").mkdir()
    apply_patch(patch, source, tmp_path / "empty")


def test_nothing_is_left_of_what_failed(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", model_of("qwen3_moe", torch.float16))
    original = files_of(source)
    patch = edited(loaded(source, "float16"))
    layer, update = patch.steps[1]
    patch.steps[1] = (layer, update.scale(1e9))
    for options in ({"out": tmp_path / "out"}, {"in_place": True}):
        with pytest.raises(NumericalError, match="would become NaN or infinite"):
            apply_patch(patch, source, **options)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
        content = files_of(source)
        assert {name: content[name] for name in original} == original
    revived = files_of(source).keys() - original.keys()
    assert not revived


# ---------------------------------------------------------------- another machine's rounding


def test_rounding_of_another_machine_is_remembered(tmp_path: Path) -> None:
    source, first, second = two_edits(tmp_path)
    for patch in (first, second):  # as if made where the last bits of these matrices came out otherwise
        patch.after = {n: {e: value ^ 1 for e, value in experts.items()} for n, experts in patch.after.items()}
    second.before = {n: {e: first.after.get(n, {}).get(e, v) for e, v in x.items()} for n, x in second.before.items()}
    once = apply_patch(first, source, tmp_path / "once")
    assert len(read_history(once)[0].own) == 2 * len(EXPERTS)
    with pytest.raises(AlreadyAppliedError):
        apply_patch(first, once, tmp_path / "again")
    twice = apply_patch(second, once, tmp_path / "twice")
    with pytest.raises(AlreadyAppliedError):
        apply_patch(second, twice, tmp_path / "again")
    assert_same_folder(revert_patch(second, twice, tmp_path / "back", once), once)
    assert_same_folder(revert_patch(first, once, tmp_path / "first", source), source)


# ---------------------------------------------------------------- in place


def test_in_place_keeps_a_backup(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", model_of("qwen3_moe"), "60KB")
    original, model = files_of(source), loaded(source)
    patch = edited(model)
    assert apply_patch(patch, source, in_place=True) == source
    assert torch.equal(logits(loaded(source)), logits(model))
    after = files_of(source)
    backup = {name for name in after if name.startswith(staging.BACKUP)}
    changed = {name for name in original if after[name] != original[name]}
    assert backup == {f"{staging.BACKUP}/{patch.id}/{name}" for name in changed}
    assert all(after[f"{staging.BACKUP}/{patch.id}/{name}"] == original[name] for name in changed)
    assert after.keys() == original.keys() | backup | {EDITS}
    with pytest.raises(AlreadyAppliedError):
        apply_patch(patch, source, in_place=True)
    back = revert_patch(patch, source, tmp_path / "back")  # from the backup
    assert files_of(back) == original


class Crash(BaseException):
    pass


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_interrupted_apply_in_place_is_completed(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path / "source", model_of("qwen3_moe"), "60KB")
    patch, done, replace = edited(loaded(source)), [], Path.replace

    def crash(self: Path, target: Path) -> Path:
        if len(done) == at:
            raise Crash
        done.append(target)
        return replace(self, target)

    with monkeypatch.context() as context:
        context.setattr(Path, "replace", crash)
        with pytest.raises(Crash):
            apply_patch(patch, source, in_place=True)
    assert (source / staging.PARTIAL).exists()
    with pytest.raises(AlreadyAppliedError):  # the next command completes it first
        apply_patch(patch, source, tmp_path / "out")
    assert not (source / staging.PARTIAL).exists()
    fresh = model_of("qwen3_moe")
    patch.originals = {}
    patch.apply(fresh)
    found = dict(loaded(source).named_parameters())
    assert all(torch.equal(found[name], value) for name, value in fresh.named_parameters())


def test_what_was_interrupted_while_writing_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path / "source", model_of("qwen3_moe"))
    original, patch = files_of(source), edited(loaded(source))

    def crash(*_: object, **__: object) -> None:
        raise Crash

    with monkeypatch.context() as context:  # as a killed process leaves it: nothing is tidied up
        context.setattr(staging, "_back_up", crash)
        context.setattr(staging.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Crash):
            apply_patch(patch, source, in_place=True)
    assert (source / staging.PARTIAL).exists()
    apply_patch(patch, source, tmp_path / "out")
    assert {name: data for name, data in files_of(source).items() if name in original} == original
    assert not (source / staging.PARTIAL).exists()


def test_two_commands_at_once(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", model_of("qwen3_moe"))
    patch = edited(loaded(source))
    with (
        pytest.raises(CheckpointError, match="Another command"),
        staging.replacing_in_place(source, "other"),
    ):
        apply_patch(patch, source, in_place=True)
    apply_patch(patch, source, in_place=True)


# ---------------------------------------------------------------- MXFP4


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_mxfp4(shard: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "source", model_of("gpt_oss", torch.float32), shard)
    to_mxfp4(source)
    model = loaded(source)
    first = edited(model, (2,))
    once = apply_patch(first, source, tmp_path / "once")
    for found in (hf.AutoModelForCausalLM.from_pretrained(once), loaded(once)):
        assert torch.equal(logits(found), logits(model))
    second = edited(model, (2, 3), seed=1, parent=first.id)
    twice = apply_patch(second, once, tmp_path / "twice")
    assert torch.equal(logits(hf.AutoModelForCausalLM.from_pretrained(twice)), logits(model))
    settings = json.loads((twice / "config.json").read_text())["quantization_config"]
    assert settings["modules_to_not_convert"][-2:] == [f"model.layers.{n}.mlp.experts" for n in (2, 3)]
    before, after = tensors_of(source), tensors_of(twice)
    assert all(torch.equal(before[name], after[name]) for name in before.keys() & after.keys())
    with pytest.raises(AlreadyAppliedError):
        apply_patch(second, twice, tmp_path / "out")
    assert_same_folder(revert_patch(second, twice, tmp_path / "back", once), once)
    assert_same_folder(revert_patch(first, once, tmp_path / "first", source), source)
    original = files_of(source)
    apply_patch(first, source, in_place=True)
    assert files_of(revert_patch(first, source, tmp_path / "from backup")) == original


def test_originals_in_a_patch_do_not_give_back_mxfp4(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", model_of("gpt_oss", torch.float32))
    to_mxfp4(source)
    model = loaded(source)
    patch = kept(edited(model, (0, 1, 2, 3)), tmp_path, True)  # no MXFP4 is left in the edited checkpoint
    out = apply_patch(patch, source, tmp_path / "out")
    with pytest.raises(PatchError, match="pass base"):
        revert_patch(patch, out, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert_same_folder(revert_patch(patch, out, tmp_path / "back", source), source)


def test_a_patch_can_not_be_written_into_fp8(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", model_of("qwen3_moe"))
    to_fp8(source)
    with pytest.raises(PatchError, match=r"stored quantised, as float8_e4m3fn.*--save checkpoint.*export"):
        apply_patch(edited(loaded(source)), source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mxfp4_made_in_another_dtype(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", model_of("gpt_oss", torch.float32))
    to_mxfp4(source)
    with pytest.raises(PatchError, match="stored as bfloat16; the patch was made on a model in float32"):
        apply_patch(edited(loaded(source, "float32")), source, tmp_path / "out")
