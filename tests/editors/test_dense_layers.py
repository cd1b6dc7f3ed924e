"""AdaLoRA, whose sites are linear layers, on the dense layers of MoE models; all other methods refuse these."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from baselines import changed_parameters, check_one_edit, edit, settings
from edited_folders import saved
from tiny import CONFIGS, assert_same_state, randomise, requests, state_of, tiny_model, tiny_tokenizer
from torch import nn

from easyedit_moe.checkpoints.apply import apply_patch
from easyedit_moe.editors import AdaLoRAEditor, editor_class, make_editor
from easyedit_moe.editors.planner import Workload
from easyedit_moe.editors.proposing import propose
from easyedit_moe.editors.training import Masters
from easyedit_moe.errors import LayerError
from easyedit_moe.hparams import MoEHyperParams, hyperparams_class
from easyedit_moe.moe.layers import MoELayer, MoELayerView
from easyedit_moe.moe.loading import load_model
from easyedit_moe.patches.files import load_patch
from easyedit_moe.patches.merging import merge

pytest.importorskip("peft")
EVERY = [0, 1, 2, 3]


def qwen2_moe() -> nn.Module:
    config = CONFIGS["qwen2_moe"]()
    config.mlp_only_layers = [0, 2]
    model = hf.AutoModelForCausalLM.from_config(config)
    randomise(model)
    return model.eval()


MODELS: list[Callable[[], nn.Module]] = [lambda: tiny_model("deepseek_v3"), qwen2_moe]
families = pytest.mark.parametrize("build", MODELS, ids=["deepseek_v3", "qwen2_moe"])


def everywhere(**changes: object) -> MoEHyperParams:
    return settings("AdaLoRA", layers=EVERY, lr=2e-3, **changes)


def linear_weights(model: nn.Module, dense: list[int]) -> set[str]:
    """Those of attention in all layers, and of the FFN in the dense ones, by name alone."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and (".self_attn." in name or any(f"layers.{index}.mlp." in name for index in dense))
    }


@families
def test_adalora_edits_every_layer(build: Callable[[], nn.Module]) -> None:
    model = build()
    dense = [0] if "Deepseek" in type(model).__name__ else [0, 2]
    written = linear_weights(model, dense)
    assert {f"model.layers.{index}.mlp.down_proj.weight" for index in dense} < written
    result = check_one_edit(model, everywhere(), written)
    assert {one.name for one in result.diagnosis.parameters} == written
    assert all(one.relative_update > 0 for one in result.diagnosis.parameters)


@families
def test_patches_of_dense_layers_are_merged_and_reverted(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, copy = build(), build()
    before = state_of(model)
    for number, layers in enumerate(([0, 1], [0])):
        facts = requests(4)[2 * number : 2 * number + 2]
        edit(model, settings("AdaLoRA", layers=layers, lr=2e-3), facts).patch.save(
            tmp_path / f"{number}.safetensors", keep_originals=True
        )
    whole = merge([load_patch(tmp_path / f"{number}.safetensors") for number in range(2)])
    whole.apply(copy)
    assert changed_parameters(state_of(model), copy) == set()
    assert changed_parameters(before, copy)
    whole.revert(copy)
    assert_same_state(before, state_of(copy))


@families
def test_a_checkpoint_takes_the_patch(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    source = saved(tmp_path / "source", build())
    model = load_model(str(source), "float32")[0]
    patch = edit(model, everywhere(target_modules=["down_proj", "o_proj"]), requests(2)).patch
    patch.save(tmp_path / "patch.safetensors")
    out = apply_patch(load_patch(tmp_path / "patch.safetensors"), source, tmp_path / "out")
    assert changed_parameters(state_of(model), load_model(str(out), "float32")[0]) == set()


@families
def test_plans_count_the_dense_layers(build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    hp, seen, model = everywhere(), [], build()
    original = Masters.__init__

    def counting(self: Masters, *args: object) -> None:
        original(self, *args)
        seen.append(sum(value.numel() for value in self.values.values()))

    monkeypatch.setattr(Masters, "__init__", counting)
    result = edit(model, hp, requests(2))
    planned = AdaLoRAEditor.trained(hp, MoELayerView(model))
    assert 0 <= seen[0] - planned.numbers < 0.1 * planned.numbers  # one singular value per rank and module
    written = [model.get_parameter(name) for name in result.patch.names]
    assert planned.written == sum(p.numel() * p.element_size() for p in written)
    with torch.device("meta"):
        empty = hf.AutoModelForCausalLM.from_config(model.config)
    plans = [AdaLoRAEditor.plan_for(settings("AdaLoRA", layers=layers), empty, Workload()) for layers in ([0], EVERY)]
    assert plans[0].peak < plans[1].peak
    assert plans[1] == make_editor(hp).plan(empty)


def test_layers_that_adalora_can_not_edit() -> None:
    model = tiny_model("deepseek_v3")
    before = state_of(model)
    with pytest.raises(LayerError, match=r"layers \[4\] are out of range: the model has layers 0 to 3"):
        edit(model, settings("AdaLoRA", layers=[0, 4]), requests(1))
    with pytest.raises(LayerError, match=r"Layer 0 \(model.layers.0\) has no qkv for AdaLoRA"):
        make_editor(settings("AdaLoRA", layers=[0], target_modules=["qkv"])).prepare(model, tiny_tokenizer())
    with pytest.raises(LayerError, match=r"Layer 1 .* has no gate_proj beside its MoE block for AdaLoRA"):
        edit(model, settings("AdaLoRA", layers=[0, 1], target_modules=["gate_proj"]), requests(1))
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("method", ["MoE-FT", "MoE-FT-L", "MoE-LoRA", "UnKE", "Global", "MoTE"])
def test_other_methods_refuse_dense_layers(method: str) -> None:
    values = {"alg_name": method, "model_name": "tiny", "layers": [0], "dtype": "float32"}
    editor = make_editor(hyperparams_class(method).from_dict(values), progress=False)
    model = tiny_model("deepseek_v3")
    before = state_of(model)
    refused = r"layers \[0\] are dense; the MoE layers of this model are \[1, 2, 3\]"
    with pytest.raises(LayerError, match=refused):
        editor.prepare(model, tiny_tokenizer())
    with pytest.raises(LayerError, match=refused):
        editor.plan(model)
    assert_same_state(before, state_of(model))


def test_the_layers_that_each_method_can_edit() -> None:
    view = MoELayerView(tiny_model("deepseek_v3"))
    found = {name: editor_class(name).editable_layers(view) for name in ("AdaLoRA", "MoE-LoRA", "Global")}
    assert found == {"AdaLoRA": EVERY, "MoE-LoRA": [1, 2, 3], "Global": [1, 2, 3]}
    assert [isinstance(layer, MoELayer) for layer in view.decoder([0, 1])] == [False, True]
    assert [layer.name for layer in view.decoder([0, 3])] == ["model.layers.0", "model.layers.3"]


@pytest.mark.parametrize(("family", "wanted"), [("deepseek_v3", EVERY), ("nemotron_h", [0, 2])])
def test_proposals_leave_out_layers_without_a_linear_one(family: str, wanted: list[int]) -> None:
    found = propose("m", "AdaLoRA", loaded=tiny_model(family))
    assert found.hparams().layers == wanted
    assert f"papers: all that it can edit, {len(wanted)} of 4 layers" in found.yaml()
