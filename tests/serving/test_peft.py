"""Adapters that PEFT alone loads: the model with one answers as the edited model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from edited_folders import edited, logits, model_of, saved
from planted_patches import write
from safetensors.torch import load_file
from tiny import tiny_model
from torch import Tensor, nn

from easyedit_moe.algebra.routed_keys import FactoredUpdate
from easyedit_moe.errors import NumericalError, PatchError
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches.inspection import expert_factors
from easyedit_moe.patches.weights import WeightPatch, writing
from easyedit_moe.serving.adapter_files import is_turned
from easyedit_moe.serving.factors import layer_factors
from easyedit_moe.serving.forms import PREFIX
from easyedit_moe.workflow.export import export

FAMILIES = ["qwen3_moe", "gpt_oss", "mixtral", "qwen3_5_moe", "deepseek_v3", "nemotron_h", "multimodal qwen3_vl_moe"]


def exported(patch: WeightPatch, folder: Path, **options: Any) -> Any:
    return export(patch, "peft", folder, progress=False, **options)


def deltas_of(patch: WeightPatch) -> dict[tuple[int, int], Tensor]:
    return {(layer, expert): left @ right.T for layer, expert, left, right in expert_factors(patch)}


def with_adapter(model: nn.Module, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(model, str(folder)).eval()


@pytest.mark.parametrize("family", [*FAMILIES, "old_style"])
def test_peft_alone_loads_what_the_edit_wrote(family: str, tmp_path: Path) -> None:
    model = model_of(family, torch.float32)
    before, base = logits(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    layers = (1, 3) if family == "nemotron_h" else (1, 2)
    patch = write(model, layers)
    after, weights = logits(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    assert (after - before).abs().max() > 0.01
    patch.revert(model)
    found = exported(patch, tmp_path / "adapter")
    assert found.form == ("per-expert" if family == "old_style" else "packed")
    assert (found.rank, found.layers[0].loss < 1e-6) == (3, True)
    served = with_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(served), after, rtol=1e-4, atol=1e-5)
    merged = served.merge_and_unload()
    for name, parameter in merged.named_parameters():
        # Exactly the written weights, up to one rounding of float32; what was not edited to the bit.
        change = (weights[name] - base[name]).abs().max()
        torch.testing.assert_close(parameter.detach(), weights[name], rtol=0, atol=float(change) * 1e-5)


SITES = {"qwen2_moe": ("shared_expert", (1, 2)), "deepseek_v3": ("shared_expert", (1, 2)), "glm4_moe": ("dense", (0,))}


@pytest.mark.parametrize("family", SITES)
def test_a_shared_expert_or_dense_ffn_is_an_ordinary_linear_layer(family: str, tmp_path: Path) -> None:
    site, layers = SITES[family]
    source = saved(tmp_path / "source", model_of(family, torch.float32))
    model = model_of(family, torch.float32)
    patch = edited(model, layers, site=site)
    after = logits(model)
    patch.revert(model)
    found = exported(patch, tmp_path / "adapter", model=str(source), form="per-expert")
    assert (found.form, found.layers[0].loss < 1e-6) == ("per-expert", True)
    served = with_adapter(model, tmp_path / "adapter")
    targets = {name.removesuffix(".lora_A.default.weight") for name, _ in served.named_parameters() if "lora_A" in name}
    assert len(targets) == len(layers)
    assert all(name.endswith(".down_proj") for name in targets)
    torch.testing.assert_close(logits(served), after, rtol=1e-4, atol=1e-5)
    assert exported(patch, tmp_path / "by_default").form == "per-expert"
    for server in ("vllm", "sglang"):
        with pytest.raises(PatchError, match=r"no routed expert.*--to peft"):
            export(patch, server, tmp_path / server, model=str(source), progress=False)
    with pytest.raises(PatchError, match="packed"):
        exported(patch, tmp_path / "packed", form="packed")


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_in_bfloat16_the_loss_is_that_of_rounding(family: str, tmp_path: Path) -> None:
    model = model_of(family, torch.float32)
    patch = edited(model)
    after = logits(model)
    patch.revert(model)
    before = logits(model)
    found = exported(patch, tmp_path / "adapter", dtype="bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    assert all(1e-4 < one.loss < 2**-8 for one in found.layers)
    error = (logits(with_adapter(model, tmp_path / "adapter")) - after).norm() / (after - before).norm()
    assert 1e-5 < error < 0.02


def test_the_dtype_is_that_of_the_edited_weights(tmp_path: Path) -> None:
    model = model_of("qwen3_moe")
    patch = edited(model)
    patch.revert(model)
    assert exported(patch, tmp_path / "adapter").dtype == "bfloat16"
    with_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("rank", [1, 2, 3, 9])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "old_style"])
def test_a_lower_rank_is_the_truncated_svd_of_each_expert(family: str, rank: int, tmp_path: Path) -> None:
    model = model_of(family, torch.float32)
    patch = write(model)
    dense = deltas_of(patch)
    patch.revert(model)
    found = exported(patch, tmp_path / "adapter", rank=rank, score=False)
    assert found.rank == min(rank, 3)
    served = with_adapter(model, tmp_path / "adapter")
    cut: dict[tuple[int, int], Tensor] = {}
    for key, delta in dense.items():
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        cut[key] = (u[:, :rank] * s[:rank]) @ v[:rank]
    for one in found.layers:
        keys = [key for key in dense if key[0] == one.layer]
        lost = sum(float((dense[key] - cut[key]).norm()) ** 2 for key in keys)
        total = sum(float(dense[key].norm()) ** 2 for key in keys)
        assert one.loss == pytest.approx((lost / total) ** 0.5, abs=1e-6)
        assert (one.experts, one.exact_rank, one.rank) == (3, 3, min(rank, 3))
    original = {key: MoELayerView(model_of(family, torch.float32)).layers[key[0]].experts.read(key[1]) for key in dense}
    view = MoELayerView(served.merge_and_unload())
    for (layer, expert), delta in cut.items():
        written = view.layers[layer].experts.read(expert).double() - original[layer, expert].double()
        torch.testing.assert_close(written, delta, rtol=0, atol=1e-6)


def test_what_peft_0_18_reads() -> None:
    """Its rule, written down: delta[e, i, o] = sum_r B[o, r, e] A[e, r, i] on the parameter as it is stored."""
    assert is_turned("0.18.0")
    assert is_turned("0.18.1")
    assert not is_turned("0.20.0")
    assert not is_turned("0.21.2.dev0")
    assert not is_turned("1.0.0")
    for wrong in ("0.19.1", "0.17.0", "newest", ""):
        with pytest.raises(PatchError):
            is_turned(wrong)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_layout_of_0_18(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    patch = write(model)
    patch.revert(model)
    exported(patch, tmp_path / "adapter", peft_version="0.18.1")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_version"] == "0.18.1"
    for layer in (1, 2):
        moe = MoELayerView(model).layers[layer]
        stored = model.get_parameter(f"{moe.experts_name}.down_proj")
        a = tensors[f"{PREFIX}{moe.experts_name}.lora_A.weight"]
        b = tensors[f"{PREFIX}{moe.experts_name}.lora_B.weight"]
        count = len(stored)
        delta = torch.einsum("ore,eri->eio", b.reshape(b.shape[0], -1, count), a.reshape(count, -1, a.shape[1]))
        assert delta.shape == stored.shape
        for (here, expert), dense in deltas_of(patch).items():
            if here == layer:
                found = delta[expert].T if moe.experts.layout.transposed else delta[expert]
                torch.testing.assert_close(found.double(), dense, rtol=0, atol=1e-6)
        assert not delta[1].any()


def test_the_per_expert_form_on_request_has_the_checkpoints_names(tmp_path: Path) -> None:
    model = model_of("mixtral")
    source = saved(tmp_path / "source", model)
    patch = edited(model)
    exported(patch, tmp_path / "adapter", form="per-expert", model=str(source))
    names = sorted(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    wanted = [f"{PREFIX}model.layers.{n}.block_sparse_moe.experts.{e}.w2" for n in (1, 2) for e in (1, 4, 5)]
    assert names == sorted(f"{name}.lora_{side}.weight" for name in wanted for side in "AB")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == [name.removeprefix(PREFIX) for name in wanted]
    assert config["target_parameters"] is None


def test_several_writes_of_an_expert_are_one_update() -> None:
    model = tiny_model()
    view = MoELayerView(model)
    left, right = torch.randn(32, 1), torch.randn(24, 1)

    def one(scale: float) -> FactoredUpdate:
        return FactoredUpdate(left * scale, (2,), (torch.tensor([0]),), (right,))

    with writing(view) as writer:
        for scale in (0.25, 0.5):
            writer.write(1, one(scale))
        writer.write(2, one(1.0))
        writer.write(2, one(-1.0))
        patch = writer.finish({}, model_fingerprint(view))
    (factors,) = layer_factors(patch)  # what cancels is not there
    assert (factors.layer, factors.rank, list(factors.experts)) == (1, 1, [2])
    b, a = factors.experts[2]
    torch.testing.assert_close(b @ a, 0.75 * left @ right.T)
    (dense,) = (delta for _, delta in factors.update().deltas())
    torch.testing.assert_close(dense, 0.75 * left @ right.T)


def test_what_can_not_be_factored() -> None:
    model = tiny_model()
    nothing = write(model, scale=0.0)
    with pytest.raises(PatchError, match="changes nothing"):
        layer_factors(nothing)
    patch = write(model)
    for rank in (0, -1):
        with pytest.raises(PatchError, match="at least 1"):
            layer_factors(patch, rank)
    large = write(model, scale=1e30)
    with pytest.raises(NumericalError, match="overflow"):
        layer_factors(large, dtype=torch.float16)
