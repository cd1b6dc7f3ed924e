from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny import assert_same_state, requests, state_of, tiny_model, tiny_tokenizer
from torch import Tensor, nn

from easyedit_moe.adapters.attachment import add_subjects, attach, detach, find_adapter
from easyedit_moe.adapters.moe_adapter import AdapterConfig, Fact, MoEAdapter, base_fingerprint
from easyedit_moe.adapters.saving import load_with_adapter, save_with_adapter
from easyedit_moe.errors import AdapterError, EditingWarning

TOK = tiny_tokenizer()
SUBJECTS = [request["subject"] for request in requests(3)]
WARNING = "writes the base alone"


def with_adapter(model: nn.Module) -> MoEAdapter:
    config = AdapterConfig(1, 32, 4, 16, 2, 0.5, 0.1, 1.0, True, "skip", base_fingerprint(model))
    adapter = attach(model, TOK, MoEAdapter(config).to(next(model.parameters()).dtype).requires_grad_(False).eval())
    add_subjects(model, TOK, adapter, SUBJECTS)
    adapter.second.data += torch.randn(adapter.second.shape, generator=torch.Generator().manual_seed(1)).to(
        adapter.second
    )
    adapter.facts, adapter.edits = (Fact("a", "b", "c"),), 2
    return adapter


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=torch.tensor([TOK(requests(1)[0]["prompt"])["input_ids"]])).logits


# ---------------------------------------------------------------- the warning


def test_saving_warns_while_the_adapter_is_attached_and_only_then(tmp_path: Path) -> None:
    model = tiny_model()
    attributes = set(vars(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "before")
    adapter = with_adapter(model)
    with pytest.warns(EditingWarning, match=WARNING) as told:
        model.save_pretrained(tmp_path / "with", safe_serialization=True)
    assert Path(told[0].filename) == Path(__file__)
    assert (tmp_path / "with" / "model.safetensors").read_bytes() == (
        tmp_path / "before" / "model.safetensors"
    ).read_bytes()
    assert detach(model) is adapter
    assert set(vars(model)) == attributes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "after")


def test_a_deep_copy_saves_itself_and_warns_for_itself(tmp_path: Path) -> None:
    model = tiny_model()
    adapter = with_adapter(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    with pytest.warns(EditingWarning, match=WARNING):
        other.save_pretrained(tmp_path / "copy")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert not again.lm_head.weight.any()
    detach(other)
    assert "save_pretrained" not in vars(other)
    assert find_adapter(model) is adapter
    with pytest.warns(EditingWarning, match=WARNING):
        model.save_pretrained(tmp_path / "model")
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model").lm_head.weight.any()
    alone = copy.deepcopy(adapter)
    assert find_adapter(model) is not alone


def test_somebody_elses_save_pretrained_is_kept(tmp_path: Path) -> None:
    model, calls = tiny_model(), []

    def theirs(*args: Any, **kwargs: Any) -> str:
        calls.append((args, kwargs))
        return "done"

    model.save_pretrained = theirs
    with_adapter(model)
    with pytest.warns(EditingWarning, match=WARNING):
        assert model.save_pretrained("x", y=1) == "done"
    assert calls == [(("x",), {"y": 1})]
    detach(model)
    assert model.save_pretrained is theirs


def test_a_wrapper_around_ours_stays_and_no_longer_warns(tmp_path: Path) -> None:
    model = tiny_model()
    with_adapter(model)
    ours = model.save_pretrained
    model.save_pretrained = wrapper = lambda *args: ours(*args)
    detach(model)
    assert model.save_pretrained is wrapper
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


# ---------------------------------------------------------------- one file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_file_holds_all(dtype: torch.dtype, tmp_path: Path) -> None:
    model, other = tiny_model(dtype=dtype), tiny_model(dtype=dtype)
    adapter = with_adapter(model)
    adapter.save(tmp_path / "a.safetensors")
    adapter.save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a.safetensors"]
    one, two = MoEAdapter.load(tmp_path / "a.safetensors"), MoEAdapter.load(tmp_path / "folder")
    for loaded in (one, two):
        assert (loaded.config, loaded.subjects, loaded.facts, loaded.edits) == (
            adapter.config, adapter.subjects, adapter.facts, 2,
        )  # fmt: skip
        assert loaded.id == adapter.id
    attach(other, TOK, one)
    assert torch.equal(logits(other), logits(model))


def test_files_that_are_no_adapter_or_another_models(tmp_path: Path) -> None:
    first, second = tiny_model(), tiny_model(seed=1)
    with_adapter(first).save(tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(AdapterError, match="holds an adapter of another model"):
        with_adapter(second).save(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == content
    (tmp_path / "b.safetensors").write_bytes(content[:-9])
    with pytest.raises(AdapterError, match="truncated"):
        MoEAdapter.load(tmp_path / "b.safetensors")
    with pytest.raises(AdapterError, match="does not exist"):
        MoEAdapter.load(tmp_path / "c.safetensors")
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(AdapterError, match="is a folder"):
        find_adapter(first).save(tmp_path / "d.safetensors")


# ---------------------------------------------------------------- checkpoint and adapter


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_beside_its_base_and_loaded_again(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(family, dtype=dtype)
    adapter = with_adapter(model)
    before = state_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EditingWarning)
        save_with_adapter(model, TOK, tmp_path / "out")
    assert_same_state(before, state_of(model))
    again, tok = load_with_adapter(tmp_path / "out")
    assert next(again.parameters()).dtype == dtype
    assert MoEAdapter.load(tmp_path / "out").id == adapter.id
    assert find_adapter(again).facts == adapter.facts
    # As the very adapter computes on the checkpoint that transformers loads by itself.
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    unedited = logits(plain)
    attach(plain, TOK, detach(model))
    assert torch.equal(logits(again), logits(plain))
    assert not torch.equal(logits(again), unedited)
    assert tok("Lyon")["input_ids"] == TOK("Lyon")["input_ids"]
    detach(again)
    assert torch.equal(logits(again), unedited)
    with pytest.raises(AdapterError, match="no adapter to save"):
        save_with_adapter(model, TOK, tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_the_base_can_be_written_otherwise_and_warnings_come_back(tmp_path: Path) -> None:
    model = tiny_model()
    with_adapter(model)

    def fails(folder: Path) -> None:
        assert folder.name == "out"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_with_adapter(model, TOK, tmp_path / "out", fails)
    with pytest.warns(EditingWarning, match=WARNING):
        model.save_pretrained(tmp_path / "base")


def test_a_folder_with_another_models_adapter_is_left_alone(tmp_path: Path) -> None:
    first, second = tiny_model(), tiny_model(seed=1)
    with_adapter(first)
    with_adapter(second)
    save_with_adapter(first, TOK, tmp_path)
    content = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(AdapterError, match="holds an adapter of another model"):
        save_with_adapter(second, TOK, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == content


def test_the_loader_script_answers(tmp_path: Path) -> None:
    model = tiny_model()
    with_adapter(model)
    model.generation_config.max_new_tokens = 5
    save_with_adapter(model, TOK, tmp_path)
    script = tmp_path / "load_with_adapter.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) == 5
    prompt = requests(1)[0]["prompt"]
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, str(script), prompt], capture_output=True, text=True, check=True, env=here)
    expected = TOK.decode(model.generate(**TOK(prompt, return_tensors="pt"))[0])
    assert done.stdout.strip() == expected.strip()
