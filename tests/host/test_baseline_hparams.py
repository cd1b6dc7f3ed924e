from __future__ import annotations

import pytest
from tiny import tiny_multimodal

from easyedit_moe.comparison.settings import resolve_hparams
from easyedit_moe.host.baseline_hparams import BaselineHyperParams
from easyedit_moe.host.baseline_planner import edited_parameters
from easyedit_moe.moe.layers import decoder_stack


@pytest.mark.parametrize("method", ["FT", "ROME"])
def test_names_of_a_text_model_fit_a_multimodal_one(method: str) -> None:
    model = tiny_multimodal()
    shipped = resolve_hparams(method, "qwen3.6-35b-a3b", None, {})
    assert isinstance(shipped, BaselineHyperParams)
    hparams = BaselineHyperParams(method, {**shipped.values, "layers": [3]})
    named = hparams.named_for(decoder_stack(model)[1])
    assert set(edited_parameters(model, named)) < {name for name, _ in model.named_parameters()}
    assert named.values["lm_head_module"] == "lm_head"
    assert model.get_submodule(named.values["ln_f_module"]) is model.model.language_model.norm
    assert named.named_for(decoder_stack(model)[1]) == named
    assert hparams.named_for("model.layers") is hparams
