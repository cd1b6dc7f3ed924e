"""Names, shapes and order of what servers read, against a written description of their loaders; no server runs here.

The descriptions are of vLLM 0.33.0 and SGLang 0.5.23, read from their source.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from edited_folders import EXPERTS, edited, model_of, saved
from safetensors.torch import load_file
from torch import Tensor, nn

from easyedit_moe.errors import PatchError
from easyedit_moe.moe.config import text_config
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.loading import load_model
from easyedit_moe.patches.inspection import expert_factors
from easyedit_moe.patches.weights import WeightPatch
from easyedit_moe.serving.servers import PACKED, PER_EXPERT, SGLANG, VLLM
from easyedit_moe.workflow.export import export
from easyedit_moe.workflow.export_report import Exported

COUNT = 8


def made(family: str, to: str, folder: Path, **options: Any) -> tuple[nn.Module, WeightPatch, Exported, dict, dict]:
    """A model, a patch of its checkpoint, and what was exported: tensors and configuration."""
    source = saved(folder / "source", model_of(family))
    model = load_model(str(source), "bfloat16")[0]
    patch = edited(model, options.pop("layers", (1, 2)))
    found = export(patch, to, folder / "adapter", model=str(source), dtype="float32", progress=False, **options)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    return model, patch, found, load_file(folder / "adapter" / "adapter_model.safetensors"), config


def assert_update(patch: WeightPatch, layer: int, expert: int, found: Tensor) -> None:
    deltas = {(n, e): left @ right.T for n, e, left, right in expert_factors(patch)}
    expected = deltas.get((layer, expert), torch.zeros_like(found, dtype=torch.float64))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


# Family -> module of layer 1's experts in the checkpoint, and the projections of an expert.
ONE_BY_ONE = {
    "qwen3_moe": ("model.layers.1.mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("model.layers.1.block_sparse_moe.experts", ("w1", "w3", "w2")),
    "old_style": ("model.layers.1.mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "deepseek_v3": ("model.layers.1.mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "nemotron_h": ("backbone.layers.1.mixer.experts", ("up_proj", "down_proj")),
}


@pytest.mark.parametrize("to", ["vllm", "sglang"])
@pytest.mark.parametrize("family", ONE_BY_ONE)
def test_every_expert_and_every_projection_one_by_one(family: str, to: str, tmp_path: Path) -> None:
    module, projections = ONE_BY_ONE[family]
    layers = (1, 3) if family == "nemotron_h" else (1, 2)
    if (family, to) == ("nemotron_h", "sglang"):
        with pytest.raises(PatchError, match="without a gate projection"):
            made(family, to, tmp_path, layers=layers)
        return
    _, patch, found, tensors, config = made(family, to, tmp_path, layers=layers)
    assert found.form == PER_EXPERT
    names = {
        f"base_model.model.{module.replace('.1.', f'.{layer}.')}.{expert}.{projection}.lora_{side}.weight"
        for layer in layers
        for expert in range(COUNT)
        for projection in projections
        for side in "AB"
    }
    assert tensors.keys() == names
    for layer in layers:
        for expert in range(COUNT):
            of = f"base_model.model.{module.replace('.1.', f'.{layer}.')}.{expert}."
            for projection in projections[:-1]:
                a, b = tensors[f"{of}{projection}.lora_A.weight"], tensors[f"{of}{projection}.lora_B.weight"]
                assert (a.shape, b.shape) == ((found.rank, 32), (24, found.rank))
                assert not torch.cat([a.flatten(), b.flatten()]).any()
            a, b = tensors[f"{of}{projections[-1]}.lora_A.weight"], tensors[f"{of}{projections[-1]}.lora_B.weight"]
            assert (a.shape, b.shape) == ((found.rank, 24), (32, found.rank))
            assert_update(patch, layer, expert, b @ a)
    # One scale for all, and a list that SGLang maps to gate_up_proj and down_proj.
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (found.rank, found.rank, False)
    assert config["target_modules"] == ["gate_proj", "up_proj", "down_proj"]


PACKED_FAMILIES = {
    "gpt_oss": "model.layers.{}.mlp.experts",
    "multimodal qwen3_5_moe": "model.language_model.layers.{}.mlp.experts",
    "multimodal qwen3_vl_moe": "model.language_model.layers.{}.mlp.experts",
    "omni": "thinker.model.layers.{}.mlp.experts",
}


@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_packed_for_the_classes_that_vllm_reads_packed(family: str, tmp_path: Path) -> None:
    model, patch, found, tensors, _ = made(family, "vllm", tmp_path)
    assert found.form == PACKED
    moe = MoELayerView(model).layers[1]
    layout, r = moe.experts.layout, found.rank
    d, h, count = layout.d_model, layout.d_hidden, layout.num_experts
    assert len(tensors) == 8
    for layer in (1, 2):
        key = f"base_model.model.{PACKED_FAMILIES[family].format(layer)}"
        shapes = {name.removeprefix(key): tuple(t.shape) for name, t in tensors.items() if name.startswith(key)}
        assert shapes == {
            ".lora_A.weight": (r * count, h),
            ".lora_B.weight": (d, r * count),
            ".base_layer.lora_A.weight": (r * count, d),
            ".base_layer.lora_B.weight": (2 * h, r * count),
        }
        assert not any(t.any() for name, t in tensors.items() if "base_layer" in name)
        # As its manager takes them apart: A by experts first, B by experts last.
        a = tensors[f"{key}.lora_A.weight"].reshape(count, -1, h)
        b = tensors[f"{key}.lora_B.weight"].reshape(d, -1, count).permute(2, 0, 1)
        for expert in range(8):
            assert_update(patch, layer, expert, b[expert] @ a[expert])


def test_sglang_reads_no_packed_form(tmp_path: Path) -> None:
    _, patch, found, tensors, _ = made("gpt_oss", "sglang", tmp_path)
    assert found.form == PER_EXPERT
    assert len(tensors) == 2 * COUNT * 3 * 2
    for expert in (0, *EXPERTS):
        of = f"base_model.model.model.layers.1.mlp.experts.{expert}.down_proj"
        assert_update(patch, 1, expert, tensors[f"{of}.lora_B.weight"] @ tensors[f"{of}.lora_A.weight"])


def test_vllm_reserves_one_of_its_ranks() -> None:
    assert [VLLM.reserved_rank(rank) for rank in (1, 2, 8, 9, 64, 257, 321, 512)] == [1, 8, 8, 16, 64, 320, 512, 512]
    with pytest.raises(PatchError, match="up to rank 512; this one has rank 513"):
        VLLM.reserved_rank(513)
    assert SGLANG.reserved_rank(1000) == 1000


def test_memory_of_a_slot() -> None:
    """All of gate, up and down of Qwen3-30B-A3B at rank 64, counted one by one: 6.6 GB."""
    experts, d, h, r, layers = 128, 2048, 768, 64, 48
    one_by_one = 0
    for wide, narrow in ((d, h), (d, h), (h, d)):
        one_by_one += r * wide + narrow * r
    expected = 2 * layers * experts * one_by_one
    assert VLLM.slot_bytes(PER_EXPERT, layers, experts, d, h, r) == expected
    assert expected / 1e9 == pytest.approx(6.6, abs=0.05)
    packed = 2 * layers * experts * (r * d + 2 * h * r + r * h + d * r)
    assert VLLM.slot_bytes(PACKED, layers, experts, d, h, r) == packed < expected


@pytest.mark.parametrize("to", ["vllm", "sglang"])
def test_the_slot_and_the_command_of_an_export(to: str, tmp_path: Path) -> None:
    model, _, found, _, _ = made("deepseek_v3", to, tmp_path)
    layers, every = len(MoELayerView(model).layers), text_config(model).num_hidden_layers
    assert layers == every - 1
    reserved = {"vllm": 8, "sglang": found.rank}[to]
    count = {"vllm": layers, "sglang": every}[to]
    assert found.slot_bytes == 2 * count * COUNT * reserved * 3 * (32 + 24)
    assert f"--max-lora-rank {reserved}" in found.command
    assert str(tmp_path / "adapter") in found.command
    assert str(tmp_path / "source") in found.command
    notes = (tmp_path / "adapter" / "README.md").read_text()
    assert found.checked in notes
    assert found.command in notes
    assert "GB of GPU memory" in notes
