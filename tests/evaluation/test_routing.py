from __future__ import annotations

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from easyedit_moe.errors import RequestError
from easyedit_moe.evaluation.routing import (
    RoutingSnapshot,
    routing_similarity,
    routing_snapshot,
    routing_windows,
)
from easyedit_moe.facts.tokens import encode_context

PAIRS = [
    ("Danielle Darrieux speaks", "French"),
    ("The twin city of Lyon is", "Manila and Rome"),
    ("Angola is in", "Africa"),
    ("東京 is the capital of", "Japan"),
]


@pytest.mark.parametrize("tokens", ["last", "all"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist", "deepseek_v3"])
def test_routing_snapshot_holds_the_router_choice(family: str, tokens: str) -> None:
    model, tok = tiny_model(family), tiny_tokenizer()
    prompts = [prompt for prompt, _ in PAIRS]
    whole = routing_snapshot(model, tok, prompts, tokens=tokens)
    single = [routing_snapshot(model, tok, [prompt], tokens=tokens) for prompt in prompts]
    top = {"qwen3_moe": 3, "gpt_oss": 3, "modulelist": 3, "deepseek_v3": 3}[family]
    for layer, picked in whole.picked.items():
        assert torch.equal(picked, torch.cat([s.picked[layer] for s in single]))
        assert (picked.sum(1) == top).all()


def test_routing_similarity_is_jaccard_per_layer_and_window() -> None:
    def picked(*sets: set[int]) -> torch.Tensor:
        return torch.tensor([[j in s for j in range(4)] for s in sets])

    sets = {layer: [{0, 1}] for layer in range(8)}
    before = RoutingSnapshot({layer: picked(*s) for layer, s in {**sets, 1: [{0, 1}, {2, 3}]}.items()}, 8)
    changed = {1: [{0, 1}, {1, 2}], 2: [{0, 2}], 4: [{2, 3}]}
    after = RoutingSnapshot({layer: picked(*s) for layer, s in {**sets, **changed}.items()}, 8)
    result = routing_similarity(before, after)
    values = {1: 100 * (1 + 1 / 3) / 2, 2: 100 / 3, 4: 0.0}
    assert result["per_layer"] == pytest.approx({layer: values.get(layer, 100.0) for layer in range(8)})
    assert result["windows"] == {"early": [1, 2], "middle": [3, 4], "late": [5, 5]}
    assert result["early"] == pytest.approx((values[1] + values[2]) / 2)
    assert (result["middle"], result["late"]) == (50, 100)
    assert result["mean"] == pytest.approx(sum(result["per_layer"].values()) / 8)
    dense = RoutingSnapshot({0: picked({0, 1})}, 8)
    assert routing_similarity(dense, dense)["early"] is None, "no layer of that window has experts"


@pytest.mark.parametrize(
    ("num_layers", "wanted"),
    [
        (48, ((11, 20), (21, 30), (31, 40))),
        (40, ((11, 20), (21, 30), (31, 40))),
        (24, ((5, 9), (10, 14), (15, 19))),
        (96, ((22, 41), (42, 61), (62, 81))),
        (12, ((2, 4), (5, 6), (7, 9))),
        (4, ((0, 0), (1, 1), (2, 2))),
        (1, ((0, 0), (0, 0), (0, 0))),
    ],
)
def test_windows_are_the_papers_or_at_the_same_depth(num_layers: int, wanted: tuple[tuple[int, int], ...]) -> None:
    assert routing_windows(num_layers) == wanted


def test_the_last_token_is_that_of_each_prompt() -> None:
    model, tok = tiny_model(), tiny_tokenizer()
    prompts = [prompt for prompt, _ in PAIRS]
    last = routing_snapshot(model, tok, prompts).picked
    lengths = [len(encode_context(tok, prompt, False)) for prompt in prompts]
    ends = torch.tensor(lengths).cumsum(0) - 1
    for layer, every in routing_snapshot(model, tok, prompts, tokens="all").picked.items():
        assert len(every) == sum(lengths)
        assert torch.equal(last[layer], every[ends])
    with pytest.raises(RequestError, match="tokens must be last or all"):
        routing_snapshot(model, tok, prompts, tokens="first")


def test_routing_similarity_sees_a_changed_router() -> None:
    model, tok = tiny_model(), tiny_tokenizer()
    prompts = [prompt for prompt, _ in PAIRS]
    before = routing_snapshot(model, tok, prompts)
    assert routing_similarity(before, routing_snapshot(model, tok, prompts))["mean"] == 100
    with torch.no_grad():
        model.model.layers[2].mlp.gate.weight.copy_(torch.randn_like(model.model.layers[2].mlp.gate.weight))
    after = routing_similarity(before, routing_snapshot(model, tok, prompts))
    assert after["per_layer"][1] == 100
    assert after["per_layer"][2] < 90
