"""EasyEdit's WISE beside ours, and GRACE, which can't be. What takes ``host`` needs a checkout of EasyEdit."""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from easyedit_methods import settings
from tiny import TEXTS, assert_same_state, requests, state_of, tiny_model, tiny_multimodal, tiny_tokenizer
from torch import nn
from typer.testing import CliRunner

from easyedit_moe.commands.app import app
from easyedit_moe.editors.planner import Workload
from easyedit_moe.errors import HyperParamsError, LayerError, MethodError
from easyedit_moe.evaluation.scoring import score_targets
from easyedit_moe.facts.requests import parse_requests
from easyedit_moe.host.baseline_hparams import BaselineHyperParams
from easyedit_moe.host.baseline_planner import plan_baseline
from easyedit_moe.host.baselines import BaselineEditor
from easyedit_moe.host.wise import UNRELATED, check_site, site_of, unrelated_text
from easyedit_moe.hparams import hparams_folder, presets
from easyedit_moe.moe.layers import decoder_stack

FACTS = parse_requests(requests(4))
SITE = "model.layers.{}.self_attn.o_proj"


pytestmark = pytest.mark.usefixtures("own_folder", "no_editing_warnings")


def wise(layer: int = 1, **changes: Any) -> BaselineHyperParams:
    inner = [f"model.layers[{layer}].self_attn.o_proj.weight"]
    return settings(Path("unused"), "WISE", inner_params=inner, **changes)


def everything(model: nn.Module, tok: Any) -> dict[str, Any]:
    caches = (
        importlib.import_module("easyeditor.models.wise.WISE"),
        importlib.import_module("easyeditor.models.wise.utils"),
    )
    return state_of(model) | {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "hooks": len(model._forward_pre_hooks),
        "tokenizer": (tok.padding_side, tok.pad_token),
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "caches": (caches[0].edit_history, caches[0].merge_group_edit_history, caches[1].CONTEXT_TEMPLATES_CACHE),
    }


def assert_equal(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert_same_state(before, after)
    tensors = ("parameters", "buffers")
    assert {k: v for k, v in before.items() if k not in tensors} == {k: v for k, v in after.items() if k not in tensors}


@pytest.mark.parametrize(("family", "layer"), [("qwen3_moe", 1), ("qwen3_5_moe", 3), ("mixtral", 2), ("olmoe", 0)])
@pytest.mark.parametrize("frequencies", [(500, 1000), (1, 2)])
def test_batches_accumulate_and_everything_comes_back(
    frequencies: tuple[int, int], family: str, layer: int, host: ModuleType
) -> None:
    model, tok = tiny_model(family), tiny_tokenizer(padding_side="right", pad=False)
    model.model.layers[0].train()
    save, merge = frequencies
    editor = BaselineEditor(wise(layer, save_freq=save, merge_freq=merge))
    before, site = everything(model, tok), SITE.format(layer)
    weight = model.get_submodule(site).weight
    patches, states = [], []
    for batch in (FACTS[:2], FACTS[2:3], FACTS[3:]):
        patches.append(editor.edit(model, tok, batch).patch)
        states.append(everything(model, tok))
        assert model.get_submodule(site).layer.weight is weight
        assert model.get_submodule(site).editing_total_cnt == (2, 3, 4)[len(patches) - 1]
    first, second, third = (scores(model, tok) for _ in range(3))
    assert first == second == third  # asking changes nothing
    assert all(torch.equal(p, before["parameters"][n]) for n, p in model.named_parameters() if n in before["parameters"]
               if not n.startswith(site))  # fmt: skip
    assert [flag for name, flag in states[-1]["requires_grad"].items() if site not in name] == [
        flag for name, flag in before["requires_grad"].items() if site not in name
    ]
    for number in (2, 1):
        patches[number].restore(model)
        assert_equal(states[number - 1], everything(model, tok))
        assert model.get_submodule(site).editing_total_cnt == number + 1
    patches[0].restore(model)
    patches[0].restore(model)  # again, without harm
    assert_equal(before, everything(model, tok))
    assert model.get_submodule(site).weight is weight


def scores(model: nn.Module, tok: Any) -> list[float]:
    return [score.nll for score in score_targets(model, tok, [(f.prompt, f.target_new) for f in FACTS])]


@pytest.mark.parametrize("save", [500, 1])
def test_an_answer_does_not_depend_on_what_is_asked_beside_it(save: int, host: ModuleType) -> None:
    model, tok = tiny_model(), tiny_tokenizer()
    margins = {"act_margin": [0.01, 0.5, 0.2], "norm_constraint": 5.0, "n_iter": 10, "edit_lr": 20.0}
    BaselineEditor(wise(save_freq=save, merge_freq=2 * save, **margins)).edit(model, tok, FACTS[:3])
    pairs = [(f.prompt, f.target_new) for f in FACTS] + [(text, "Rome") for text in TEXTS]
    together = [score.nll for score in score_targets(model, tok, pairs)]
    alone = [score_targets(model, tok, [pair])[0].nll for pair in pairs]
    assert together == pytest.approx(alone, rel=1e-4)
    plain = [score.nll for score in score_targets(tiny_model(), tok, pairs)]
    told = [abs(a - b) > 1e-6 for a, b in zip(alone, plain, strict=True)]
    assert any(told[:3])  # the facts are answered by other weights


def test_facts_are_learnt(host: ModuleType) -> None:
    model, tok = tiny_model(), tiny_tokenizer()
    before = scores(model, tok)[0]
    BaselineEditor(wise(3, n_iter=30, edit_lr=5.0, norm_constraint=5.0)).edit(model, tok, FACTS[:1])
    assert scores(model, tok)[0] < before - 0.5


def test_generation_with_and_without_a_cache_agree(host: ModuleType) -> None:
    model, tok = tiny_model(), tiny_tokenizer(padding_side="left")
    BaselineEditor(wise()).edit(model, tok, FACTS[:2])
    ids = tok([f.prompt for f in FACTS], padding=True, return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] == ids["input_ids"].shape[1] + 4


def test_texts_that_no_fact_is_about() -> None:
    tok = tiny_tokenizer()
    long = (
        "A prompt that is long enough to hold all of those texts, however many tokens the small tokenizer needs for it"
    )
    assert [unrelated_text(tok, i, long, "Rome") for i in range(5)] == [*UNRELATED, UNRELATED[0]]
    short = unrelated_text(tok, 1, "Ana is in", "Rome")
    assert UNRELATED[1].startswith(short)
    assert len(tok(short)["input_ids"]) <= len(tok("Ana is in Rome")["input_ids"])
    assert unrelated_text(tok, 0, f"{UNRELATED[0]} {long}", "x") == UNRELATED[1]


def test_names_of_a_text_model_fit_a_multimodal_one() -> None:
    model = tiny_multimodal()
    named = wise(3).named_for(decoder_stack(model)[1])
    assert site_of(named) == "model.language_model.layers.3.self_attn.o_proj"
    assert check_site(model, named) is model.get_submodule(site_of(named))
    assert named.layers == (3,)
    assert named.named_for(decoder_stack(model)[1]) == named


WRONG = [
    ("gpt_oss", "model.layers[1].self_attn.o_proj.weight", r"layers\.1\.self_attn\.o_proj has a bias"),
    ("qwen3_moe", "model.layers[1].mlp.experts.down_proj", r"no module .*experts\.down_proj"),
    ("qwen3_moe", "model.layers[1].mlp.experts", r"no linear module but Qwen3MoeExperts.*o_proj"),
    ("qwen3_moe", "model.layers[9].self_attn.o_proj.weight", r"no module model\.layers\.9"),
    ("qwen3_5_moe", "model.layers[1].self_attn.o_proj.weight", r"no module .*layers\.1\.self_attn"),
]


@pytest.mark.parametrize(("family", "name", "message"), WRONG)
def test_a_site_that_can_t_work_is_refused(family: str, name: str, message: str, host: ModuleType) -> None:
    model, tok = tiny_model(family), tiny_tokenizer()
    before, hp = everything(model, tok), settings(Path("unused"), "WISE", inner_params=[name])
    for call in (
        lambda: BaselineEditor(hp).edit(model, tok, FACTS[:1]),
        lambda: BaselineEditor(hp).prepare(model, tok),
        lambda: plan_baseline(hp, model, Workload()),
    ):
        with pytest.raises(LayerError, match=message):
            call()
    assert_equal(before, everything(model, tok))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner_params": []}, r"inner_params must name a parameter.*found \[\]"),
        ({"inner_params": "model.layers[2].x"}, "inner_params must name a parameter"),
        ({"inner_params": ["lm_head.weight"]}, "inner_params must name a parameter"),
        ({"merge_freq": 3, "save_freq": 2}, "merge_freq must be a multiple of save_freq; found 3 and 2"),
        ({"save_freq": 0}, "merge_freq must be a multiple"),
    ],
)
def test_unusable_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HyperParamsError, match=message):
        settings(Path("unused"), "WISE", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retrieve": False}, "retrieve must be true"),
        ({"inner_params": ["model.layers[1].self_attn.o_proj.weight"] * 2}, "a list of one parameter's name"),
    ],
)
def test_settings_that_can_t_be_compared(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HyperParamsError, match=message):
        plan_baseline(settings(Path("unused"), "WISE", **changes), tiny_model(), Workload())


def test_grace_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="GRACE is not offered here: it looks for its key at one position"):
        presets.find_method("GRACE")
    for command in (["compare", "--out", str(tmp_path / "out"), "--methods"], ["plan", "--method"]):
        done = CliRunner().invoke(app, [*command, "GRACE"])
        assert done.exit_code == 2
        assert "looks for its key at one position" in " ".join(done.output.split())
    assert not (hparams_folder() / "GRACE").exists()
