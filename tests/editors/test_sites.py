"""Every closed-form editor at every site."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from solving_editors import METHODS, TOK, changed_parameters, edit, hparams, plain_ridge
from tiny import TEXTS, assert_same_state, requests, shared_model, state_of, tiny_model

from easyedit_moe.editors import make_editor
from easyedit_moe.editors.statistics_plan import plan_statistics
from easyedit_moe.errors import CacheError, EditingWarning, HyperParamsError, LayerError, PatchError
from easyedit_moe.facts.requests import parse_requests
from easyedit_moe.hparams import hyperparams_class
from easyedit_moe.hparams.sites import DENSE, EXPERTS, SHARED_EXPERT
from easyedit_moe.moe.capture import capture_facts
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.shapes import shapes_of
from easyedit_moe.patches.merging import merge
from easyedit_moe.patches.weights import WeightPatch
from easyedit_moe.statistics.__main__ import main
from easyedit_moe.storage.tensors import read_metadata
from easyedit_moe.targets.search import fact_contexts

SITES = {SHARED_EXPERT: ("qwen2_moe", [1, 2], "mlp.shared_expert"), DENSE: ("qwen3_moe", [0, 2], "mlp")}


def model_of(site: str) -> torch.nn.Module:
    family = SITES[site][0]
    if site == SHARED_EXPERT:
        return tiny_model(family)
    import transformers as hf
    from tiny import CONFIGS, randomise

    config = CONFIGS[family]()
    config.mlp_only_layers = [0, 2]
    model = hf.AutoModelForCausalLM.from_config(config)
    randomise(model)
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS * 8), encoding="utf-8")
    return tmp_path


@pytest.mark.filterwarnings("ignore::easyedit_moe.errors.EditingWarning")
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_edits_every_site_and_reverts(method: str, site: str, folder: Path) -> None:
    model, (_, layers, path) = model_of(site), SITES[site]
    before, layers = state_of(model), layers[-1:] if method == "MoE-ROME" else layers
    hp = hparams(folder, method, site=site, layers=layers, nullspace_threshold=0.3, nullspace_relative=True)
    result = edit(model, hp, requests())
    assert changed_parameters(before, model) == {f"model.layers.{n}.{path}.down_proj.weight" for n in layers}
    assert result.patch.site == site
    assert {layer.layer: [e.expert for e in layer.experts] for layer in result.diagnosis.layers} == {
        n: [0] for n in layers
    }
    result.patch.save(folder / "patch.safetensors")
    after = state_of(model)
    result.patch.revert(model)
    assert_same_state(before, state_of(model))
    loaded = WeightPatch.load(folder / "patch.safetensors")
    assert (loaded.site, loaded.id) == (site, result.patch.id)
    loaded.apply(model)
    assert_same_state(after, state_of(model))
    loaded.revert(model)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("method", ["Global", "MoTE", "MoEEdit-BCD"])
@pytest.mark.parametrize("site", SITES)
def test_an_edit_is_the_dense_ridge_solution(method: str, site: str, folder: Path) -> None:
    model, layer = model_of(site), SITES[site][1][-1]
    more = {"num_passes": 200} if method == "MoEEdit-BCD" else {}
    hp = plain_ridge(folder, method, site=site, layers=[layer], lambda_reg=0.05, **more)
    view, facts = MoELayerView(model, site=site), parse_requests(requests())
    contexts = [context for fact in facts for context in fact_contexts(TOK, fact, (), hp.fact_token, False)]
    keys = capture_facts(view, [c.ids for c in contexts], [c.fact for c in contexts], [layer], [], 0).keys[layer]
    old = view.layers[layer].experts.read(0).double().clone()
    result = edit(model, hp, requests())
    z = (keys.gate * keys.key[:, 0]).double()
    wanted = result.targets[0].delta.double().T @ torch.linalg.solve(z @ z.T + 0.05 * torch.eye(len(z)).double(), z)
    torch.testing.assert_close(view.layers[layer].experts.read(0).double() - old, wanted, rtol=1e-3, atol=1e-6)


def test_statistics_of_sites_are_never_mixed(folder: Path) -> None:
    model = tiny_model("qwen2_moe")
    for site in (EXPERTS, SHARED_EXPERT):
        make_editor(hparams(folder, "MoTE", site=site, layers=[1]), progress=False).prepare(model, TOK)
    files = sorted((folder / "stats").rglob("layer1-*.safetensors"))
    assert len({file.name for file in files}) == 2 == len({file.parent for file in files})
    first, second = (file.read_bytes() for file in files)
    files[0].write_bytes(second)
    files[1].write_bytes(first)
    for site in (EXPERTS, SHARED_EXPERT):
        editor = make_editor(hparams(folder, "Global", site=site, layers=[1]), progress=False)
        with pytest.raises(CacheError, match="site: expected"):
            editor.prepare(model, TOK)


def test_the_command_that_gathers_on_several_gpus_takes_the_site(folder: Path) -> None:
    model = tiny_model("qwen2_moe")
    model.save_pretrained(folder / "model")
    TOK.save_pretrained(folder / "model")
    hp = hparams(folder, site=SHARED_EXPERT, layers=[1], model_name=str(folder / "model"))
    hp.to_yaml(folder / "hparams.yaml")
    main([str(folder / "hparams.yaml"), "--stats-dir", str(folder / "stats")])
    files = list((folder / "stats").rglob("layer*.safetensors"))
    assert [read_metadata(file, CacheError, "")["key"]["site"] for file in files] == [SHARED_EXPERT]
    make_editor(hp, progress=False).prepare(model, TOK)
    assert list((folder / "stats").rglob("layer*.safetensors")) == files, "what was gathered is read"


def test_patches_of_one_site_merge_and_of_two_do_not(folder: Path) -> None:
    model = tiny_model("qwen2_moe")
    before = state_of(model)
    hp = plain_ridge(folder, site=SHARED_EXPERT)
    patches = [edit(model, hp, requests()[n : n + 1]).patch for n in range(2)]
    after, merged = state_of(model), merge(patches)
    assert merged.site == SHARED_EXPERT
    merged.revert(model)
    assert_same_state(before, state_of(model))
    merged.apply(model)
    assert_same_state(after, state_of(model))
    routed = edit(model, plain_ridge(folder), requests()[2:]).patch
    with pytest.raises(PatchError, match=r"different sites .*shared_expert, experts"):
        merge([merged, routed])
    routed.revert(model)
    merged.revert(model)
    assert_same_state(before, state_of(model))


def test_an_unknown_site_and_layers_without_it_are_refused(folder: Path) -> None:
    with pytest.raises(HyperParamsError, match="site must be one of experts, shared_expert, dense; found 'shared'"):
        hparams(folder, site="shared")
    with pytest.raises(HyperParamsError, match="unknown key 'site'"):
        hyperparams_class("MoE-FT").from_dict(
            {"alg_name": "MoE-FT", "model_name": "x", "layers": [1], "site": SHARED_EXPERT}
        )
    with pytest.raises(LayerError, match=r"no dense FFN"):
        edit(shared_model("qwen2_moe"), plain_ridge(folder, site=DENSE), requests())


def test_plans_count_one_expert(folder: Path) -> None:
    model = shared_model("qwen2_moe")
    shapes = shapes_of(model, [1, 2], SHARED_EXPERT)
    assert (shapes.experts, shapes.active, shapes.d_model, shapes.d_hidden) == (1, 1, 32, 40)
    hp = hparams(folder, "MoTE", site=SHARED_EXPERT, rank_expert=4)
    assert make_editor(hp, progress=False).plan(model).shapes == shapes
    assert plan_statistics(hp, model).disk_bytes == 2 * (4 * (40 * 40 + 32 * 32) + 8 + 8 * (1 + 32 * 32 + 40 * 20))


def test_sequential_batches_remember_their_keys(folder: Path) -> None:
    model = tiny_model("qwen2_moe")
    editor = make_editor(plain_ridge(folder, site=SHARED_EXPERT, remember_edits=True), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EditingWarning)
        first = editor.edit(model, TOK, parse_requests(requests()[:2]))
        second = editor.edit(model, TOK, parse_requests(requests()[2:]), first.memory)
    assert second.diagnosis.remembered == 2
