"""Targets of layers whose experts write fewer numbers than the layer's output has stay within the experts' reach."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny import facts, tiny_tokenizer

from benchmarks.family_models import families, tiny_model
from easyedit_moe.errors import EditingWarning
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.tails import FactPlaces, pulled_back
from easyedit_moe.targets.search import TargetSearch, TargetSettings, fact_contexts

TOK = tiny_tokenizer()


@pytest.mark.parametrize("family", ["hy_v4", "deepseek_v4", "qwen4_exp"])
def test_targets_among_several_streams_can_be_brought_about(family: str) -> None:
    if family not in families():
        pytest.skip(f"this transformers has no {family}")
    view = MoELayerView(tiny_model(family))
    layer = sorted(view.layers)[0]
    settings = TargetSettings(6, 0.1, 0.0625, 0.5, 4.0, 0.05, 64, "subject_last")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EditingWarning)
        found = TargetSearch(view, TOK, layer, (), settings, progress=False).targets(facts(3))
    assert found.final_nll.mean() < found.initial_nll.mean()
    contexts = [fact_contexts(TOK, fact, (), "subject_last")[0] for fact in facts(3)]
    places = FactPlaces(view, [c.ids for c in contexts], [c.fact for c in contexts], 0)
    assert found.delta.norm(dim=1).min() > 0.1
    reached = pulled_back(layer, found.delta, places).reached
    assert ((reached - found.delta).norm(dim=1) < 0.02 * found.delta.norm(dim=1)).all()
    assert torch.linalg.matrix_rank(found.delta[0].reshape(-1, 32), rtol=1e-2) == 1  # each stream gets a multiple
