from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tiny import NOT_IN_OLD, OLD_TRANSFORMERS, tiny_model, tiny_multimodal
from torch import nn

from easyedit_moe.checkpoints.naming import CheckpointNames
from easyedit_moe.checkpoints.parameters import StoredParameters
from easyedit_moe.checkpoints.shards import Checkpoint
from easyedit_moe.errors import CheckpointError

FAMILIES = ("qwen3_moe", "gpt_oss", "mixtral", "granitemoe", "qwen3_5_moe", "deepseek_v3", "nemotron_h")
MULTIMODAL = ("qwen3_5_moe", "qwen3_vl_moe")


def stored(folder: Path) -> StoredParameters:
    return StoredParameters(CheckpointNames(folder, Checkpoint.of_folder(folder)))


def assert_holds(parameters: StoredParameters, model: nn.Module) -> None:
    assert not parameters.names.missing
    assert set(parameters.names.parameters) == {name for name, _ in model.named_parameters()}
    for name, value in model.named_parameters():
        assert torch.equal(parameters.read(name).to(value.dtype), value), name
        for row in range(len(value)) if "experts" in name else ():
            assert torch.equal(parameters.read(name, row).to(value.dtype), value[row]), (name, row)


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_found(family: str, original: bool, tmp_path: Path) -> None:
    if OLD_TRANSFORMERS and family in NOT_IN_OLD:
        pytest.skip("the family is not in this version of transformers")
    model = tiny_model(family)
    model.save_pretrained(tmp_path, save_original_format=original, max_shard_size="200KB")
    assert len(Checkpoint.of_folder(tmp_path).files) > 1
    assert_holds(stored(tmp_path), model)


@pytest.mark.parametrize("family", MULTIMODAL)
def test_multimodal_models_are_found_whole(family: str, tmp_path: Path) -> None:
    model = tiny_multimodal(family)
    model.save_pretrained(tmp_path)
    assert_holds(stored(tmp_path), model)


def test_experts_stored_the_other_way_round(tmp_path: Path) -> None:
    """As Qwen3-VL-MoE's own checkpoints are; transformers turns them while loading."""
    model = tiny_multimodal("qwen3_vl_moe")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    turned = {n: t.mT.contiguous() if "experts" in n and t.dim() == 3 else t for n, t in load_file(file).items()}
    save_file(turned, file, metadata={"format": "pt"})
    assert torch.equal(hf.AutoModelForImageTextToText.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)
    assert_holds(stored(tmp_path), model)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_writing_one_expert_changes_nothing_else(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    name = next(n for n, _ in model.named_parameters() if "2." in n and n.endswith("experts.down_proj"))
    parameter = model.get_parameter(name)
    parameters = stored(tmp_path)
    parameters.write(name, torch.full_like(parameter[3], 7.0), 3)
    with torch.no_grad():
        parameter[3] = 7.0
    assert_holds(stored(tmp_path), model)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, dict(model.named_parameters())[n]) for n, value in loaded.named_parameters())


def test_the_body_alone_is_found_under_its_shorter_names(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({n.removeprefix("model."): t for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    assert_holds(stored(tmp_path), model)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds neither"):
        Checkpoint.of_folder(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    parameters = stored(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no parameter model\.nothing"):
        parameters.read("model.nothing")
    with pytest.raises(CheckpointError, match="stored as"):
        parameters.write("lm_head.weight", torch.zeros(3, 3))
    tensors = load_file(file)
    gone = next(name for name in tensors if "layers.1" in name and "experts.3.down_proj" in name)
    save_file({n: t for n, t in tensors.items() if n != gone}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="experts"):
        stored(tmp_path).read("model.layers.1.mlp.experts.down_proj")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint.of_folder(tmp_path)
