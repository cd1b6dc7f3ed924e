"""Shared experts and dense FFNs as sites: keys, gates and sums are those of the model."""

from __future__ import annotations

import pytest
import torch
from tiny import assert_same_state, shared_model, state_of, tiny_model, tiny_tokenizer, token_ids
from torch import nn

from benchmarks.family_models import tiny_model as family_model
from easyedit_moe.errors import LayerError, LayoutError, QuantizedExpertsError
from easyedit_moe.hparams.sites import DENSE, SHARED_EXPERT, SITES
from easyedit_moe.moe.capture import capture_facts
from easyedit_moe.moe.fingerprint import down_checksums, model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.probe import check_keys, measured_tail
from easyedit_moe.statistics.moments import collect_moments

IDS = token_ids(12)
TOK = tiny_tokenizer()


def inputs_of(model: nn.Module, path: str, ids: list[int]) -> torch.Tensor:
    """What a module gets in a plain forward, ``[N, ...]``."""
    caught: list[torch.Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: caught.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    hook.remove()
    return caught[0].reshape(len(ids), -1)


def captured(model: nn.Module, site: str, layer: int, ids: list[int] = IDS) -> object:
    view = MoELayerView(model, site=site)
    return capture_facts(view, [ids] * 3, [2, 7, len(ids) - 1], [layer], [], 0).keys[layer]


@pytest.mark.parametrize(("family", "gated"), [("qwen2_moe", True), ("qwen3_5_moe", True), ("deepseek_v3", False)])
def test_keys_and_gates_of_a_shared_expert_are_those_of_the_formula(family: str, gated: bool) -> None:
    model, layer = shared_model(family), 2
    keys = captured(model, SHARED_EXPERT, layer)
    expert = model.model.layers[layer].mlp
    name = "shared_expert" if gated else "shared_experts"
    x = inputs_of(model, f"model.layers.{layer}.mlp", IDS)[[2, 7, 11]].double()
    ffn = getattr(expert, name)
    wanted = nn.functional.silu(x @ ffn.gate_proj.weight.double().T) * (x @ ffn.up_proj.weight.double().T)
    torch.testing.assert_close(keys.key[:, 0].double(), wanted, rtol=1e-4, atol=1e-6)
    gate = torch.sigmoid(x @ expert.shared_expert_gate.weight.double().T)[:, 0] if gated else torch.ones(3).double()
    torch.testing.assert_close(keys.gate[:, 0].double(), gate, rtol=1e-5, atol=0)
    assert keys.expert.tolist() == [[0]] * 3


def test_a_constant_factor_of_the_block_is_the_gate() -> None:
    model = family_model("cohere2_moe")
    for layer in model.model.layers:
        layer.mlp.shared_expert_combination_strategy = "average"
    keys = captured(model, SHARED_EXPERT, 1)
    torch.testing.assert_close(keys.gate, torch.full((3, 1), 0.5), rtol=1e-5, atol=0)
    assert check_keys(MoELayerView(model, site=SHARED_EXPERT), 1, IDS, 0) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_in_other_dtypes(dtype: torch.dtype) -> None:
    model = tiny_model("qwen2_moe", dtype=dtype)
    keys = captured(model, SHARED_EXPERT, 1)
    block = model.model.layers[1].mlp
    x = inputs_of(model, "model.layers.1.mlp", IDS)[[2, 7, 11]]
    gate = torch.sigmoid(block.shared_expert_gate(x)).detach().float()
    torch.testing.assert_close(keys.gate, gate, rtol=2e-3, atol=0)
    check_keys(MoELayerView(model, site=SHARED_EXPERT), 1, IDS, 0)


def test_a_dense_layer_is_one_expert_with_gate_one() -> None:
    model = shared_model("glm4_moe")
    keys = captured(model, DENSE, 0)
    assert torch.equal(keys.gate, torch.ones(3, 1))
    wanted = inputs_of(model, "model.layers.0.mlp.down_proj", IDS)[[2, 7, 11]]
    torch.testing.assert_close(keys.key[:, 0], wanted)
    assert measured_tail(MoELayerView(model, site=DENSE), 0, IDS, 0).kind == "identity"


def test_layers_without_the_site_are_refused_with_those_that_have_it() -> None:
    model = shared_model("deepseek_v3")
    with pytest.raises(LayerError, match=r"layers \[0\] have no shared expert .* have one are \[1, 2, 3\]"):
        MoELayerView(model, site=SHARED_EXPERT).require([0, 1])
    with pytest.raises(LayerError, match=r"layers \[1, 2\] have no dense FFN .* have one are \[0\]"):
        MoELayerView(model, site=DENSE).require([0, 1, 2])
    with pytest.raises(LayerError, match=r"no layer of this model has one"):
        MoELayerView(shared_model("mixtral"), site=SHARED_EXPERT).require([1])
    with pytest.raises(LayerError, match=r"layer 1 has several dense FFNs \(.*mlps.0, .*mlps.1\)"):
        MoELayerView(family_model("longcat_flash"), site=DENSE).require([1])


def test_mlp_only_layers_are_dense_sites() -> None:
    import transformers as hf
    from tiny import CONFIGS

    config = CONFIGS["qwen3_moe"]()
    config.mlp_only_layers = [0, 2]
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    view = MoELayerView(model, site=DENSE)
    assert (sorted(view.layers), sorted(view.routed)) == ([0, 2], [1, 3])
    assert max(check_keys(view, layer, IDS, 0) for layer in view.layers) < 1e-5


def test_reading_a_site_leaves_the_model_as_it_was() -> None:
    model = tiny_model("qwen3_5_moe")
    before = state_of(model)
    view = MoELayerView(model, site=SHARED_EXPERT)
    check_keys(view, 1, IDS, 0)
    measured_tail(view, 1, IDS, 0)
    captured(model, SHARED_EXPERT, 1)
    assert_same_state(before, state_of(model))


def test_fingerprints_of_sites_differ_and_leave_out_what_is_edited_there() -> None:
    model = tiny_model("deepseek_v3")
    prints = {site: model_fingerprint(MoELayerView(model, site=site)) for site in SITES}
    assert len(set(prints.values())) == 3
    sums = down_checksums(MoELayerView(model, site=SHARED_EXPERT))
    with torch.no_grad():
        model.model.layers[1].mlp.shared_experts.down_proj.weight.add_(1)
    view = MoELayerView(model, site=SHARED_EXPERT)
    assert model_fingerprint(view) == prints[SHARED_EXPERT]
    assert model_fingerprint(MoELayerView(model, site=DENSE)) != prints[DENSE]
    assert [layer for layer, known in down_checksums(view).items() if known != sums[layer]] == [1]


@pytest.mark.parametrize(("family", "site", "layer"), [("qwen2_moe", SHARED_EXPERT, 1), ("deepseek_v3", DENSE, 0)])
def test_moments_are_those_of_the_keys_that_come_to_the_down_projection(family: str, site: str, layer: int) -> None:
    model = tiny_model(family)
    texts = [token_ids(length, seed) for seed, length in enumerate((5, 17, 9))]
    view = MoELayerView(model, site=site)
    moments = collect_moments(view, TOK, texts, [layer], progress=False, dtype=torch.float64)[layer]
    path = f"{view.layers[layer].experts_name}.down_proj"
    rows = torch.cat([inputs_of(model, path, ids) for ids in texts]).double()
    torch.testing.assert_close(moments.keys[0], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)
    assert moments.counts.tolist() == [len(rows)] == [moments.num_tokens]


def test_quantised_and_adapted_down_projections_are_refused() -> None:
    model = tiny_model("deepseek_v3")
    down = model.model.layers[0].mlp.down_proj
    down.base_layer = nn.Identity()
    with pytest.raises(LayoutError, match="adapter"):
        MoELayerView(model, site=DENSE)
    del down.base_layer
    down.weight = nn.Parameter(down.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(QuantizedExpertsError, match="float8"):
        MoELayerView(model, site=DENSE)
    MoELayerView(model, site=SHARED_EXPERT)
