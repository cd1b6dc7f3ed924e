"""Memory plans of every method, ours and EasyEdit's, and what training really trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from baselines import edit as train
from baselines import settings as training_settings
from tiny import assert_same_state, requests, state_of, tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from easyedit_moe.commands.app import app
from easyedit_moe.comparison.settings import resolve_hparams
from easyedit_moe.editors import editor_class, make_editor
from easyedit_moe.editors.planner import Workload
from easyedit_moe.editors.training import Masters
from easyedit_moe.errors import DenseModelError, HyperParamsError, LayerError
from easyedit_moe.hparams import presets
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.loading import empty_model

ALL = [method.name for method in [*presets.own_methods(), *presets.host_methods()]]
TRAINING = ["MoE-FT", "MoE-FT-L", "MoE-LoRA", "AdaLoRA"]


@pytest.mark.parametrize("method", ALL)
def test_the_command_plans_every_method(method: str) -> None:
    shown = CliRunner().invoke(app, ["plan", "--method", method, "--edits", "7"])
    assert shown.exit_code == 0, shown.output
    assert f"{method} on factworld" in shown.output
    refused = CliRunner().invoke(app, ["plan", "--method", method, "--budget", "1e-5"])
    assert refused.exit_code == 1
    assert "does not fit" in refused.output


@pytest.mark.parametrize("method", ALL)
def test_a_plan_is_complete(method: str) -> None:
    settings = resolve_hparams(method, "factworld", None, {})
    model, cls = empty_model("factworld", "float32"), editor_class(method)
    found = cls.plan_for(settings, model, Workload())
    json.dumps(found.to_dict())
    assert found.edits == settings.to_dict().get("batch_size", 1)
    assert found.peak == max(found.peaks()) > found.shapes.parameters
    assert found.fits
    more = cls.plan_for(settings, model, Workload(edits=500))
    assert more.peak >= found.peak
    if presets.find_method(method).host_name is None:
        assert make_editor(settings, progress=False).plan(model, edits=500) == more
    with pytest.raises(HyperParamsError, match="budget must be greater than 0"):
        cls.plan_for(settings, model, Workload(budget=0))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
@pytest.mark.parametrize("method", TRAINING)
def test_planned_numbers_are_those_that_are_trained(
    method: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hp, seen = training_settings(method), []
    original = Masters.__init__

    def counting(self: Masters, *args: Any) -> None:
        original(self, *args)
        if not seen:
            seen.append(sum(value.numel() for value in self.values.values()))

    planned = editor_class(method).trained(hp, MoELayerView(tiny_model(family)))
    monkeypatch.setattr(Masters, "__init__", counting)
    train(tiny_model(family), hp, requests(2))
    extra = seen[0] - planned.numbers
    # AdaLoRA also has one singular value per rank and module.
    assert extra == 0 or (method == "AdaLoRA" and 0 < extra < 0.1 * planned.numbers)


def test_what_a_model_lacks_is_refused() -> None:
    mote = resolve_hparams("MoTE", "factworld", None, {})
    with pytest.raises(DenseModelError):
        editor_class("MoTE").plan_for(mote, tiny_model("dense"), Workload())
    lora = resolve_hparams("LoRA", "factworld", None, {"target_modules": ["nothing"]})
    with pytest.raises(LayerError, match="none of nothing"):
        editor_class("LoRA").plan_for(lora, tiny_model(), Workload())
    rome = resolve_hparams("ROME", "factworld", None, {"rewrite_module_tmp": "model.layers.{}.input_layernorm"})
    with pytest.raises(LayerError, match="no linear module"):
        editor_class("ROME").plan_for(rome, tiny_model(), Workload())


@pytest.mark.parametrize("method", [m.name for m in presets.own_methods()])
def test_preparing_checks_the_layers_and_changes_nothing(method: str) -> None:
    settings = resolve_hparams(method, "factworld", None, {"layers": [9]})
    model = tiny_model()
    before = state_of(model)
    with pytest.raises(LayerError, match="out of range"):
        make_editor(settings, progress=False).prepare(model, tiny_tokenizer())
    assert_same_state(before, state_of(model))
