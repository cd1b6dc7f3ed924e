"""What shifts at one layer reach: the search is an edit's, and carrying over is seen in plain forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import assert_same_state, shared_model, state_of, tiny_model, tiny_tokenizer
from torch import Tensor, nn

from easyedit_moe.facts.records import EvaluationRecord
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.facts.tokens import encode_pair, encode_prompt
from easyedit_moe.localisation.reachability import carried_over, reachability
from easyedit_moe.moe.capture import hooks, layer_output
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.targets.search import TargetSearch, TargetSettings

TOK = tiny_tokenizer()
SETTINGS = TargetSettings(6, 0.5, 0.0625, 0.0, 4.0, 0.0, 3, "subject_last")


def records() -> list[EvaluationRecord]:
    return [
        EvaluationRecord(
            EditRequest("Lyon lies in", "Lyon", "Rome", "Paris"), ("Today Lyon is in", "It is in", "Lyon is near"), ()
        ),
        EvaluationRecord(EditRequest("The home of Ana is", "Ana", "Zwolle"), ("We met Ana in",), ()),
        EvaluationRecord(EditRequest("Angola is in", "Angola", "Russia", "Africa"), (), ()),
    ]


def search(model: nn.Module, layer: int, settings: TargetSettings = SETTINGS) -> TargetSearch:
    return TargetSearch(MoELayerView(model), TOK, layer, (), settings, False, warn=False)


def plain_nll(model: nn.Module, layer: int, request: EditRequest, answer: str, shift: Tensor) -> float:
    """NLL per token from a plain forward with the shift added at the fact token."""
    place = encode_prompt(TOK, request.prompt, request.subject, "subject_last", answer)
    labels = encode_pair(TOK, request.prompt, answer, request.subject)[1]

    def add(module: nn.Module, args: tuple, output: Any) -> Any:
        hidden = layer_output(output).clone()
        hidden[0, place.fact] += shift
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    with torch.no_grad(), hooks() as handles:
        handles.append(MoELayerView(model).decoder_layers[layer].register_forward_hook(add))
        logits = model(input_ids=torch.tensor([[*place.ids, *labels[:-1]]])).logits[0, len(place.ids) - 1 :]
    return float(nn.functional.cross_entropy(logits, torch.tensor(labels)))


@pytest.mark.parametrize(("family", "layer"), [("qwen3_moe", 0), ("qwen3_5_moe", 2), ("modulelist", 1)])
def test_carried_over_is_what_plain_forwards_say(family: str, layer: int) -> None:
    model = shared_model(family)
    delta = torch.randn(3, 32, generator=torch.Generator().manual_seed(layer)) * 2
    before, after, preferred = carried_over(search(model, layer), records(), delta)
    lyon = [EditRequest(text, "Lyon", "Rome") for text in ("Today Lyon is in", "Lyon is near")]
    ana = EditRequest("We met Ana in", "Ana", "Zwolle")
    zero = torch.zeros(32)
    assert len(before) == len(after) == len(preferred) == 2  # the third has no other phrasing
    expected = [plain_nll(model, layer, r, "Rome", delta[0]) for r in lyon]
    assert after[0] == pytest.approx(sum(expected) / 2, abs=1e-3)
    assert after[1] == pytest.approx(plain_nll(model, layer, ana, "Zwolle", delta[1]), abs=1e-3)
    still = [plain_nll(model, layer, r, "Rome", zero) for r in lyon]
    assert before[0] == pytest.approx(sum(still) / 2, abs=1e-3)
    wins = [new < plain_nll(model, layer, r, "Paris", delta[0]) for r, new in zip(lyon, expected, strict=True)]
    assert preferred[0] == 100 * sum(wins) / 2


def test_it_is_an_edit_s_search() -> None:
    model = tiny_model()
    before, own = state_of(model), search(model, 1)
    found = reachability(own, records())
    assert_same_state(before, state_of(model))
    targets = own.find([record.request for record in records()])
    assert found.final_nll.mean == pytest.approx(float(targets.final_nll.mean()), abs=1e-5)
    assert found.worst_nll == pytest.approx(float(targets.final_nll.max()), abs=1e-5)
    assert found.final_nll.mean < found.initial_nll.mean - 0.5
    assert found.norm.mean == pytest.approx(float(targets.delta.norm(dim=1).mean()), rel=1e-4)
    assert found.reached.mean == pytest.approx(100 * float(targets.reached.double().mean()))
    bound = reachability(search(model, 1, TargetSettings(6, 0.5, 0.0, 0.0, 0.25, 0.0, None, "subject_last")), records())
    assert bound.relative_norm.mean == pytest.approx(0.25, abs=1e-3)


def test_from_the_last_layer_a_fact_token_before_the_end_reaches_nothing() -> None:
    model = shared_model()
    found = reachability(search(model, 3), records()[:2])
    assert found.final_nll.mean == pytest.approx(found.initial_nll.mean, abs=1e-4)
    assert found.paraphrase_nll.mean == pytest.approx(found.paraphrase_before.mean, abs=1e-4)


def test_without_other_phrasings_nothing_is_said_of_them() -> None:
    found = reachability(search(shared_model(), 0), records()[2:])
    assert found.carried.count == found.paraphrase_nll.count == 0
    assert found.final_nll.count == 1
