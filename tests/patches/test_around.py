"""Patches on models whose weights are shared, wrapped, carry an adapter, or lie elsewhere: exact, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from planted_patches import new_values, update_for, write, write_tensors
from tiny import COMMON, assert_same_state, randomise, state_of, tiny_model, tiny_tokenizer
from torch import nn

from easyedit_moe.adapters.attachment import attach, detach
from easyedit_moe.adapters.moe_adapter import AdapterConfig, MoEAdapter, base_fingerprint
from easyedit_moe.errors import EditingError, LayoutError, PatchError
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches.files import load_patch
from easyedit_moe.patches.tensors import writing_tensors
from easyedit_moe.patches.weights import writing

FAMILIES = ["qwen3_moe", "gpt_oss", "modulelist"]
DOWN = "model.layers.{}.mlp.experts.down_proj"


def weights(model: nn.Module, seed: int = 0) -> Any:
    return write(model, seed=seed)


def tensors(model: nn.Module, seed: int = 0) -> Any:
    names = [n for n, _ in model.named_parameters() if ".layers.1." in n and ("down_proj" in n or "o_proj" in n)]
    return write_tensors(model, new_values(model, seed, [n for n in names if "lora" not in n and "adapter" not in n]))


KINDS = pytest.mark.parametrize("make", [weights, tensors])


def there_and_back(make: Callable[..., Any], model: nn.Module, fresh: nn.Module, folder: Path) -> None:
    """Write, revert, apply again, save, load on another copy, and revert by every way there is."""
    before = state_of(model)
    patch = make(model)
    edited = state_of(model)
    patch.save(folder / "p.safetensors", keep_originals=True)
    patch.revert(model)
    assert_same_state(before, state_of(model))
    patch.apply(model)
    assert_same_state(edited, state_of(model))
    patch.restore(model)
    assert_same_state(before, state_of(model))
    loaded = load_patch(folder / "p.safetensors")
    untouched = state_of(fresh)
    loaded.apply(fresh)
    if type(fresh) is type(model):
        assert_same_state(edited, state_of(fresh))
    load_patch(folder / "p.safetensors").revert(fresh)
    assert_same_state(untouched, state_of(fresh))


# ---------------------------------------------------------------- shared weights


def with_shared_layers(family: str) -> nn.Module:
    """Layers 1 and 2 have the same experts."""
    model = tiny_model(family)
    model.model.layers[2].mlp.experts = model.model.layers[1].mlp.experts
    return model


def with_shared_tensors(family: str) -> nn.Module:
    """Layers 1 and 2 have experts modules of their own around the same parameters."""
    model = tiny_model(family)
    first, second = model.model.layers[1].mlp.experts, model.model.layers[2].mlp.experts
    if family == "modulelist":
        for one, other in zip(first, second, strict=True):
            other.down_proj.weight = one.down_proj.weight
    else:
        second.down_proj = first.down_proj
    return model


def with_shared_memory(family: str) -> nn.Module:
    """Two parameters over one piece of memory."""
    model = tiny_model(family)
    first, second = model.model.layers[1].mlp.experts, model.model.layers[2].mlp.experts
    if family == "modulelist":
        for one, other in zip(first, second, strict=True):
            other.down_proj.weight.data = one.down_proj.weight.data
    else:
        second.down_proj.data = first.down_proj.data
    return model


@KINDS
@pytest.mark.parametrize("build", [with_shared_layers, with_shared_tensors, with_shared_memory])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_share_their_experts(make: Any, build: Any, family: str, tmp_path: Path) -> None:
    there_and_back(make, build(family), build(family), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_experts_written_again_and_again(family: str, tmp_path: Path) -> None:
    """What a layer finds when it is written may be another layer's edit, and no original."""

    def make(model: nn.Module) -> Any:
        view = MoELayerView(model)
        with writing(view) as writer:
            for seed, (layer, experts) in enumerate([(2, (0, 3)), (1, (3, 5)), (2, (5, 6)), (1, (0, 6))]):
                writer.write(layer, update_for(view, layer, seed=seed, experts=experts))
            return writer.finish({}, model_fingerprint(view))

    there_and_back(make, with_shared_tensors(family), with_shared_tensors(family), tmp_path)


def test_experts_of_one_layer_that_share_a_matrix(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = tiny_model("modulelist")
        experts = model.model.layers[1].mlp.experts
        experts[3].down_proj.weight = experts[0].down_proj.weight
        return model

    there_and_back(weights, build(), build(), tmp_path)


def test_both_names_of_a_shared_parameter(tmp_path: Path) -> None:
    """Each name is kept when it is first changed; the second would remember the first one's change."""

    def make(model: nn.Module) -> Any:
        with writing_tensors(model) as writer:
            for layer in (2, 1):
                name = DOWN.format(layer)
                writer.write(name, model.get_parameter(name).detach() + 1.0)
            return writer.finish({})

    model = with_shared_tensors("qwen3_moe")
    there_and_back(make, model, with_shared_tensors("qwen3_moe"), tmp_path)
    assert make(model).names == [DOWN.format(2)]


# ---------------------------------------------------------------- a diffusion model: encoder and decoder share weights


def diffusion_model() -> nn.Module:
    if not hasattr(hf, "DiffusionGemmaConfig"):
        pytest.skip(f"transformers {hf.__version__} has no diffusion model with experts")
    text = {
        **COMMON, "head_dim": 8, "global_head_dim": 8, "num_global_key_value_heads": 2, "intermediate_size": 48,
        "moe_intermediate_size": 24, "num_experts": 8, "top_k_experts": 3,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4,
    }  # fmt: skip
    config = hf.DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=64)
    model = hf.DiffusionGemmaForBlockDiffusion(config)
    randomise(model)
    return model.eval()


def test_a_diffusion_model_whose_encoder_has_the_decoders_weights(tmp_path: Path) -> None:
    model = diffusion_model()
    view = MoELayerView(model)
    first = {id(p): n for n, p in model.named_parameters()}
    name = view.layers[1].parameter_names()[0]
    assert first[id(model.get_parameter(name))] != name  # PyTorch lists it as the encoder's

    def make(of: nn.Module) -> Any:
        return write_tensors(of, new_values(of, 0, [name]))

    there_and_back(make, model, diffusion_model(), tmp_path)
    there_and_back(weights, model, diffusion_model(), tmp_path)


# ---------------------------------------------------------------- adapters


def lora(model: nn.Module, target: list[str] | str = r".*\.o_proj", **options: Any) -> Any:
    config = peft.LoraConfig(r=2, target_modules=target, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


@KINDS
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_peft_carries_patches_of_its_base(make: Any, family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_model(family)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    patch = make(model)
    patch.save(tmp_path / "p.safetensors", keep_originals=True)
    wrapped = lora(tiny_model(family))
    before = state_of(wrapped)
    loaded = load_patch(tmp_path / "p.safetensors")
    loaded.apply(wrapped)
    assert set(loaded.weights_copy(wrapped)) <= {n for n, _ in wrapped.named_parameters()}
    loaded.revert(wrapped)
    assert_same_state(before, state_of(wrapped))
    loaded.apply(wrapped)
    load_patch(tmp_path / "p.safetensors").revert(wrapped)
    assert_same_state(before, state_of(wrapped))
    assert all(torch.equal(parameter, start[name]) for name, parameter in wrapped.unload().named_parameters())


@KINDS
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_that_came_after_the_patch(make: Any, family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    patch = make(model)
    wrapped = lora(model)
    patch.revert(wrapped)
    assert all(torch.equal(parameter, start[name]) for name, parameter in wrapped.unload().named_parameters())


@KINDS
def test_an_adapter_on_the_experts_themselves(make: Any, tmp_path: Path) -> None:
    """PEFT takes packed parameters as targets; the patch is of what lies under the adapter."""
    model = tiny_model()
    patch = make(model)
    wrapped = lora(model, [], target_parameters=["mlp.experts.down_proj"])
    patch.revert(wrapped)
    patch.apply(wrapped)
    wrapped.merge_adapter()
    merged = state_of(wrapped)
    with pytest.raises(PatchError, match="was changed after"):
        patch.revert(wrapped)
    assert_same_state(merged, state_of(wrapped))
    wrapped.unmerge_adapter()


def test_an_adapter_on_one_module_per_expert_is_refused_by_name() -> None:
    model = tiny_model("modulelist")
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    patch = write(model)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["down_proj"]), model.model.layers)
    edited = state_of(model)
    for act in (patch.revert, patch.restore):
        with pytest.raises(LayoutError, match=r"carry an adapter.*unload"):
            act(model)
        assert_same_state(edited, state_of(model))
    for module in list(model.modules()):
        if hasattr(module, "down_proj") and hasattr(module.down_proj, "base_layer"):
            module.down_proj = module.down_proj.base_layer
    patch.revert(model)
    assert all(torch.equal(parameter, start[name]) for name, parameter in model.named_parameters())


@KINDS
def test_a_patch_made_under_an_adapter(make: Any, tmp_path: Path) -> None:
    """It was computed with the adapter, so it is of that model."""
    torch.manual_seed(0)
    wrapped = lora(tiny_model())
    same = copy.deepcopy(wrapped)
    there_and_back(make, wrapped, same, tmp_path)
    plain = tiny_model()
    before = state_of(plain)
    with pytest.raises(PatchError, match="made for another model"):
        load_patch(tmp_path / "p.safetensors").apply(plain)
    assert_same_state(before, state_of(plain))


@KINDS
@pytest.mark.parametrize("family", FAMILIES)
def test_our_adapter_on_the_model(make: Any, family: str, tmp_path: Path) -> None:
    plain = make(tiny_model(family))
    plain.save(tmp_path / "plain.safetensors")
    model = tiny_model(family)
    start = state_of(model)
    config = AdapterConfig(1, 32, 2, 4, 1, 1.0, 0.0, 1.0, True, "skip", base_fingerprint(model))
    attach(model, tiny_tokenizer(), MoEAdapter(config))
    before = state_of(model)
    patch = load_patch(tmp_path / "plain.safetensors")
    patch.apply(model)
    patch.revert(model)
    assert_same_state(before, state_of(model))
    patch.apply(model)
    detach(model)
    patch.revert(model)
    assert_same_state(start, state_of(model))


def test_a_compiled_model(tmp_path: Path) -> None:
    model = tiny_model()
    before = state_of(model)
    patch = write_tensors(model, new_values(model))
    wrapped = torch.compile(model)
    patch.revert(wrapped)
    assert_same_state(before, state_of(model))
    patch.apply(wrapped)
    patch.revert(wrapped)
    assert_same_state(before, state_of(model))


# ---------------------------------------------------------------- weights that lie elsewhere


@KINDS
def test_other_layers_may_be_offloaded(make: Any, tmp_path: Path) -> None:
    model = tiny_model()
    model.model.layers[3].to("meta")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.is_meta}
    patch = make(model)
    patch.save(tmp_path / "p.safetensors", keep_originals=True)
    loaded = load_patch(tmp_path / "p.safetensors")
    patch.revert(model)
    loaded.apply(model)
    loaded.revert(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if not p.is_meta)


@KINDS
@pytest.mark.parametrize("act", ["apply", "revert", "restore", "revert with base", "turn"])
def test_a_layer_that_was_offloaded_is_refused_before_anything_changes(make: Any, act: str, tmp_path: Path) -> None:
    """Copying into the meta device does nothing and says nothing: half of an edit would stay."""
    model = tiny_model()
    names = [DOWN.format(1), DOWN.format(2)]
    patch = write(model) if make is weights else write_tensors(model, new_values(model, 0, names))
    patch.save(tmp_path / "p.safetensors", keep_originals=True)
    loaded = load_patch(tmp_path / "p.safetensors")
    if act in ("apply", "turn"):
        patch.revert(model)
    model.model.layers[2].mlp.to("meta")
    before = model.get_parameter(names[0]).detach().clone()
    actions: dict[str, Callable[[], Any]] = {
        "apply": lambda: patch.apply(model),
        "turn": lambda: loaded.apply(model),
        "revert": lambda: patch.revert(model),
        "restore": lambda: patch.restore(model),
        "revert with base": lambda: loaded.revert(model, base=tiny_model()),
    }
    with pytest.raises(EditingError, match=r"offloaded|meta"):
        actions[act]()
    assert torch.equal(model.get_parameter(names[0]), before)
    if act in ("revert", "restore"):
        assert patch.originals


@KINDS
def test_a_base_that_is_offloaded_in_part(make: Any, tmp_path: Path) -> None:
    model, base = tiny_model(), tiny_model()
    make(model).save(tmp_path / "p.safetensors")
    base.model.layers[1].to("meta")
    edited = state_of(model)
    with pytest.raises(PatchError, match=r"offloaded|lacks the weights"):
        load_patch(tmp_path / "p.safetensors").revert(model, base=base)
    assert_same_state(edited, state_of(model))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@KINDS
@pytest.mark.parametrize("family", FAMILIES)
def test_half_of_the_layers_on_a_gpu(make: Any, family: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = tiny_model(family)
        model.model.layers[2:].to("cuda")
        return model

    there_and_back(make, build(), build(), tmp_path)


@KINDS
def test_a_model_that_was_cast_since(make: Any, tmp_path: Path) -> None:
    model = tiny_model()
    patch = make(model)
    model.to(torch.bfloat16)
    before = state_of(model)
    with pytest.raises(PatchError):
        patch.revert(model)
    assert_same_state(before, state_of(model))
