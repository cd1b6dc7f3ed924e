from __future__ import annotations

import filecmp
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from quantised import set_config, to_fp8, to_mxfp4
from safetensors.torch import load_file, save_file
from tiny import TEXTS, tiny_model, tiny_multimodal, tiny_omni, tiny_tokenizer
from torch import Tensor, nn

from easyedit_moe.checkpoints.saving import check_saved, save_edited
from easyedit_moe.errors import CheckpointError
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.loading import load_model

LAYER, EXPERTS = 2, (1, 5)


def saved(folder: Path, model: nn.Module, shard: str = "150KB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def edit(model: nn.Module) -> None:
    """Change two experts of one layer, by values that bfloat16 holds."""
    with torch.no_grad():
        for expert in EXPERTS:
            MoELayerView(model).layers[LAYER].experts.read(expert).mul_(2)


def logits(model: nn.Module) -> Tensor:
    ids = tiny_tokenizer()(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).logits


def changed_files(folder: Path, other: Path) -> set[str]:
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    return {name for name in names if not filecmp.cmp(folder / name, other / name, shallow=False)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "qwen3_5_moe"])
def test_only_what_was_edited_is_written(family: str, dtype: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "source", tiny_model(family, dtype=getattr(torch, dtype)))
    (source / "LICENSE").write_text("as it was")
    model, tok = load_model(str(source), dtype)
    edit(model)
    out = save_edited(model, tok, tmp_path / "out", source)
    assert torch.equal(logits(hf.AutoModelForCausalLM.from_pretrained(out)), logits(model))
    changed = changed_files(source, out)
    assert changed
    assert all(name.endswith(".safetensors") for name in changed)
    assert len(changed) < len(list(source.glob("*.safetensors")))
    for name in changed:
        before, after = load_file(source / name), load_file(out / name)
        assert all("experts" in n and f".{LAYER}." in n for n in before if not torch.equal(before[n], after[n]))


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_mxfp4_reloads_to_the_same_bits(shard: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "source", tiny_model("gpt_oss"), shard)
    to_mxfp4(source)
    model, tok = load_model(str(source))
    unedited = logits(model)
    edit(model)
    out = save_edited(model, tok, tmp_path / "out", source)
    for loaded in (hf.AutoModelForCausalLM.from_pretrained(out), load_model(str(out))[0]):
        assert torch.equal(logits(loaded), logits(model))
        assert not torch.equal(logits(loaded), unedited)
    stored = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    before = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    dense = f"model.layers.{LAYER}.mlp.experts.down_proj"
    assert stored[dense].dtype == torch.bfloat16
    assert f"{dense}_blocks" not in stored
    kept = before.keys() & stored.keys()
    assert sum(name.endswith("_blocks") for name in kept) == 6  # the three other layers stay quantised
    assert all(torch.equal(before[name], stored[name]) for name in kept)


def test_an_mxfp4_layer_edited_again(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", tiny_model("gpt_oss"))
    to_mxfp4(source)
    model, tok = load_model(str(source))
    edit(model)
    once = save_edited(model, tok, tmp_path / "once", source)
    edit(model)
    twice = save_edited(model, tok, tmp_path / "twice", once)
    assert torch.equal(logits(hf.AutoModelForCausalLM.from_pretrained(twice)), logits(model))
    assert (once / "config.json").read_bytes() == (twice / "config.json").read_bytes()


def as_fp8(folder: Path) -> None:
    to_fp8(folder)


def as_mxfp4(folder: Path) -> None:
    to_mxfp4(folder)


@pytest.mark.parametrize(
    ("family", "quantise", "dtype"),
    [("qwen3_moe", as_fp8, "bfloat16"), ("qwen3_moe", as_fp8, "float32"), ("gpt_oss", as_mxfp4, "float32")],
)
def test_what_the_source_cannot_hold_is_saved_dense(
    family: str, quantise: Callable[[Path], None], dtype: str, tmp_path: Path
) -> None:
    source = saved(tmp_path / "source", tiny_model(family))
    quantise(source)
    (source / "LICENSE").write_text("as it was")
    model, tok = load_model(str(source), dtype)
    with torch.no_grad():
        MoELayerView(model).layers[LAYER].experts.read(1).mul_(1.001)
    out = save_edited(model, tok, tmp_path / "out", source)
    loaded = hf.AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(loaded), logits(model))
    assert not hasattr(loaded.config, "quantization_config")
    assert (out / "LICENSE").read_text() == "as it was"


def test_another_dtype_is_saved_dense(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", tiny_model(dtype=torch.bfloat16))
    model, tok = load_model(str(source), "float32")
    with torch.no_grad():
        MoELayerView(model).layers[LAYER].experts.read(1).mul_(1.001)
    out = save_edited(model, tok, tmp_path / "out", source)
    assert torch.equal(logits(hf.AutoModelForCausalLM.from_pretrained(out)), logits(model))


@pytest.mark.parametrize("name", ["qwen3_5_moe", "qwen3_vl_moe", "omni"])
def test_multimodal_checkpoints_are_saved_whole(name: str, tmp_path: Path) -> None:
    whole = tiny_omni() if name == "omni" else tiny_multimodal(name)
    source = saved(tmp_path / "source", whole)
    (source / "preprocessor_config.json").write_text("{}")
    extra = {"talker.weight": torch.randn(3, 3)}  # a part that the class in memory does not have
    save_file(extra, source / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    (source / "model-00001-of-00001.safetensors").unlink()
    model, tok = load_model(str(source), "float32")
    assert any("visual" in name for name, _ in model.named_parameters())
    edit(model)
    out = save_edited(model, tok, tmp_path / "out", source)
    assert changed_files(source, out) < {path.name for path in source.glob("*.safetensors")}
    for file in source.glob("*.safetensors"):
        before, after = load_file(file), load_file(out / file.name)
        for tensor in before:
            if not torch.equal(before[tensor], after[tensor]):
                assert f"layers.{LAYER}.mlp.experts" in tensor
    assert torch.equal(logits(load_model(str(out), "float32")[0]), logits(model))


def test_nothing_is_written_over_or_left_behind(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", tiny_model())
    model, tok = load_model(str(source), "float32")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        save_edited(model, tok, tmp_path / "full", source)
    model.model.layers[1].extra = nn.Linear(4, 4)
    with pytest.raises(CheckpointError, match="holds 2 parameters that"):
        save_edited(model, tok, tmp_path / "out", source)
    del model.model.layers[1].extra
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is quantised"):
        save_edited(model, tok, tmp_path / "out", source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "source"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


def test_a_reload_that_would_draw_weights_is_found(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", tiny_model("gpt_oss"), "1GB")
    check_saved(source)
    to_mxfp4(source)
    check_saved(source)
    model, _ = load_model(str(source))
    model.save_pretrained(tmp_path / "naive")  # dense tensors under the quantised names
    with pytest.raises(CheckpointError, match=r"draw weights at random|can't be loaded"):
        check_saved(tmp_path / "naive")
    shutil.copytree(source, tmp_path / "smaller")
    set_config(tmp_path / "smaller", hidden_size=64)
    with pytest.raises(CheckpointError, match=r"of another shape"):
        check_saved(tmp_path / "smaller")
    tensors = load_file(source / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 are missing; the first is model\.norm\.weight"):
        check_saved(source)
