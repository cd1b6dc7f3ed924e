"""Second moments of families whose experts are called otherwise, or lie in a latent space."""

from __future__ import annotations

import pytest
import torch
from tiny import shared_model, token_ids

from easyedit_moe.facts.tokens import collate
from easyedit_moe.moe.capture import Routing, hooks, inference_mode_of, read_routing, routed_keys, run
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.statistics.moments import Sums


@pytest.mark.parametrize("family", ["nemotron_latent", "llama4", "jetmoe", "gemma4"])
def test_sums_of_keys_and_outputs(family: str) -> None:
    view = MoELayerView(shared_model(family))
    moe = view.layers[max(view.layers)]
    batch = collate([token_ids(9, 1), token_ids(6, 2)], 0)
    real = torch.nonzero(batch.mask.reshape(-1)).squeeze(1)
    sums, seen = Sums(moe, torch.float64), list[Routing]()
    with inference_mode_of(view.model), hooks() as handles, sums.reading(real):
        handles.append(read_routing(moe, seen.append))
        run(view.model, batch)
    keys = routed_keys(moe, seen[0], real)
    wanted = torch.zeros_like(sums.keys)
    for expert, key in zip(keys.expert.flatten(), keys.key.flatten(0, 1).double(), strict=True):
        wanted[expert] += torch.outer(key, key)
    torch.testing.assert_close(sums.keys, wanted, atol=1e-5, rtol=1e-4)
    assert sums.counts.sum() == keys.expert.numel()
    assert sums.output.shape == (moe.experts.layout.d_model, moe.experts.layout.d_model)
    assert sums.output.trace() > 0
    assert int(sums.tokens) == len(real) == 15
