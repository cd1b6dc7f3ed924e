"""MoE-FT on experts that lie below one another in one matrix (DBRX)."""

from __future__ import annotations

import torch
from solving_editors import TOK
from tiny import assert_same_state, facts, state_of

from benchmarks.family_models import tiny_model
from easyedit_moe.editors import make_editor
from easyedit_moe.facts.tokens import encode_prompt
from easyedit_moe.hparams import hyperparams_class
from easyedit_moe.moe.capture import capture_facts
from easyedit_moe.moe.layers import MoELayerView


def test_only_the_rows_of_routed_experts_change() -> None:
    model = tiny_model("dbrx")
    before, view, (fact,) = state_of(model), MoELayerView(model), facts(1)
    prompt = encode_prompt(TOK, fact.prompt, fact.subject, "subject_last", fact.target_new)
    routed = capture_facts(view, [prompt.ids], [prompt.fact], [2], [], 0).keys[2].expert
    hp = hyperparams_class("MoE-FT").from_dict(
        {
            "alg_name": "MoE-FT",
            "model_name": "x",
            "layers": [2],
            "dtype": "float32",
            "num_steps": 2,
            "experts": "routed",
        }
    )
    old = view.layers[2].experts.stacked()
    result = make_editor(hp, progress=False).edit(model, TOK, [fact])
    change = (view.layers[2].experts.stacked() - old).flatten(1).norm(dim=1)
    assert set(torch.nonzero(change).flatten().tolist()) == set(routed.flatten().tolist())
    assert len(change) == 8 > len(set(routed.flatten().tolist()))
    result.patch.revert(model)
    assert_same_state(before, state_of(model))
