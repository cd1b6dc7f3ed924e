"""Causal tracing on models in which it is known where the fact lies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import CASES, assert_same_state, facts, shared_model, state_of, tiny_model, tiny_tokenizer
from torch import Tensor, nn

from easyedit_moe.errors import DataError, LayerError
from easyedit_moe.facts.records import EvaluationRecord
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.facts.tokens import Prompt, collate
from easyedit_moe.localisation.prompts import TracedFact, traced_facts
from easyedit_moe.localisation.routing import fact_experts
from easyedit_moe.localisation.tracing import CausalTracing, TraceSettings, contributions, expert_site
from easyedit_moe.moe.capture import Routing, hooks, layer_output, read_routing, run
from easyedit_moe.moe.experts import ModuleListExperts
from easyedit_moe.moe.layers import MoELayerView

TOK = tiny_tokenizer()
SETTINGS = TraceSettings(samples=3, batch_size=5)
ENDS_WITH_SUBJECT = [("The twin city is Lyon", "Lyon"), ("He lives in Angola", "Angola"), ("It is Paris", "Paris")]


def traced(model: nn.Module, prompts: list[tuple[str, str]] = ENDS_WITH_SUBJECT) -> list[TracedFact]:
    records = [EvaluationRecord(EditRequest(p, s, "Rome"), (), ()) for p, s in prompts]
    found = traced_facts(model, TOK, records, "subject_last")
    assert len(found) == len(prompts)
    return found


def experts_of(model: nn.Module) -> dict[int, list[Tensor]]:
    """Down-projections (and their biases) by layer, the shared expert's among them."""
    found: dict[int, list[Tensor]] = {}
    for index, moe in MoELayerView(model).layers.items():
        found[index] = [p.data for n, p in moe.block.named_parameters() if "down_proj" in n]
    return found


def only_layer_matters(model: nn.Module, layer: int) -> None:
    """Attention moves nothing, no other MoE layer adds anything, and this one's output swamps the embeddings."""
    for name, parameter in model.named_parameters():
        if ".o_proj.weight" in name:
            parameter.data.zero_()
    for index, tensors in experts_of(model).items():
        for tensor in tensors:
            tensor.mul_(1e4 if index == layer else 0)


@pytest.mark.parametrize(
    ("family", "layer"),
    [("qwen3_moe", 0), ("qwen3_moe", 2), ("qwen2_moe", 3), ("gpt_oss", 0), ("granitemoe", 1), ("modulelist", 2)],
)
def test_restoring_the_only_layer_that_matters_restores_the_answer(family: str, layer: int) -> None:
    model = tiny_model(family)
    only_layer_matters(model, layer)
    view = MoELayerView(model)
    tracing = CausalTracing(view, TOK, traced(model), sorted(view.layers), SETTINGS)
    lost = tracing.clean - tracing.corrupted.mean(1)
    scale = 100 * float(lost.abs().max())
    assert scale > 1e-3
    for index in view.layers:
        found = tracing.layer(index)
        assert found.clean.mean == pytest.approx(100 * float(tracing.clean.mean()))
        if index == layer:
            assert found.restored.mean == pytest.approx(found.clean.mean, abs=1e-2 * scale)
            assert found.effect.mean == pytest.approx(100 * float(lost.mean()), abs=1e-2 * scale)
        else:
            assert found.effect.mean == pytest.approx(0, abs=1e-2 * scale)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist"])
def test_the_only_expert_that_matters_is_found(family: str) -> None:
    model, layer = tiny_model(family), 1
    found = traced(model)
    view = MoELayerView(model)
    only_layer_matters(model, layer)
    picked = fact_experts(view, [Prompt(f.ids, f.fact) for f in found], [layer], 0)[layer]
    expert = int(picked.sum(0).argmax())
    for tensor in experts_of(model)[layer]:
        if tensor.dim() < 2 or tensor.shape[0] != 8:
            continue  # one module per expert, below
        tensor[[j for j in range(8) if j != expert]] = 0
    for name, parameter in view.layers[layer].block.named_parameters():
        if family == "modulelist" and "down_proj" in name and not name.startswith(f"experts.{expert}."):
            parameter.data.zero_()
    tracing = CausalTracing(view, TOK, found, [layer], SETTINGS)
    rows = tracing.experts(layer)
    lost = 100 * (tracing.clean - tracing.corrupted.mean(1))
    uses = picked[:, expert]
    by_number = {row.expert: row for row in rows}
    assert by_number[expert].facts == int(uses.sum()) > 0
    assert by_number[expert].effect.mean == pytest.approx(float(lost[uses].mean()), rel=1e-2, abs=1e-6)
    assert by_number[expert].total == pytest.approx(float(lost[uses].sum()) / len(found), rel=1e-2, abs=1e-6)
    assert {row.expert for row in rows} == set(torch.nonzero(picked.any(0)).squeeze(1).tolist())
    assert all(abs(row.total) < 1e-6 for row in rows if row.expert != expert)


@pytest.mark.parametrize(("family", "how"), [*CASES, ("nemotron_h", "eager"), ("laguna", "eager")])
def test_contributions_add_up_to_what_the_experts_return(family: str, how: str) -> None:
    view = MoELayerView(shared_model(family, how))
    moe = view.layers[max(view.layers)]
    batch, seen, outputs = collate([[5, 9, 12, 44], [7, 8]], 0), [], []
    with torch.no_grad(), hooks() as handles:
        handles.append(read_routing(moe, seen.append))
        site = expert_site(moe)
        handles.append(site.register_forward_hook(lambda _, __, out: outputs.append(layer_output(out))))
        run(view.model, batch)
        (routing,) = seen
        sums = contributions(moe, routing, routing.expert).sum(1)
        whole = outputs[0].reshape(sums.shape).float()
        if isinstance(moe.experts, ModuleListExperts):
            whole = whole - moe.block.shared_expert(routing.hidden)
        torch.testing.assert_close(sums, whole, atol=1e-5, rtol=1e-4)
        absent = torch.tensor([[next(j for j in range(8) if j not in row)] for row in routing.expert.tolist()])
        assert not contributions(moe, routing, absent).any()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "modulelist"])
def test_restoring_experts_is_what_a_forward_by_hand_does(family: str) -> None:
    """One fact, one draw: each expert's restored probability, from a forward whose fact token is written by hand."""
    model = shared_model(family)
    view, (fact,) = MoELayerView(model), traced(model, [("The mother tongue of Zoë Łukasz is", "Zoë Łukasz")])
    layer = sorted(view.layers)[1]
    tracing = CausalTracing(view, TOK, [fact], [layer], TraceSettings(samples=1))
    clean, noisy = tracing._clean.routing[layer], tracing._noisy.routing[layer]
    moe = view.layers[layer]
    ids = torch.tensor([[*fact.ids, *fact.answer[:-1]]])
    embedded = model.get_input_embeddings()(ids).detach()
    start, end = fact.subject
    embedded[0, start : end + 1] += tracing._noise(0)[0]
    for row in tracing.experts(layer):
        wanted = torch.tensor([[row.expert]])
        change = (contributions(moe, clean, wanted) - contributions(moe, noisy, wanted))[0, 0].detach()

        def add(module: nn.Module, args: tuple, out: Any, change: Tensor = change) -> Any:
            moved = layer_output(out).reshape(ids.shape[1], -1).clone()
            moved[fact.fact] += change
            moved = moved.reshape(layer_output(out).shape)
            return moved if isinstance(out, Tensor) else (moved, *out[1:])

        with torch.no_grad(), hooks() as handles:
            handles.append(expert_site(moe).register_forward_hook(add))
            logits = model(inputs_embeds=embedded).logits[0, len(fact.ids) - 1 :].float()
        by_hand = -nn.functional.cross_entropy(logits, torch.tensor(fact.answer))
        effect = 100 * float(by_hand.exp() - tracing.corrupted[0, 0])
        assert row.effect.mean == pytest.approx(effect, abs=1e-4)


def test_draws_do_not_depend_on_other_facts_or_on_the_batch() -> None:
    model = shared_model()
    view, found = MoELayerView(model), traced(model)
    whole = CausalTracing(view, TOK, found, [1], SETTINGS)
    again = CausalTracing(view, TOK, found[::-1], [1], TraceSettings(samples=3, batch_size=2))
    torch.testing.assert_close(whole.corrupted, again.corrupted.flip(0))
    assert not torch.equal(whole._noise(0)[0], whole._noise(0)[1])
    assert whole.layer(1).effect.mean == pytest.approx(again.layer(1).effect.mean, abs=1e-4)
    other = CausalTracing(view, TOK, found, [1], TraceSettings(samples=3, seed=1))
    assert not torch.allclose(whole.corrupted, other.corrupted)


def test_with_next_to_no_noise_nothing_is_lost() -> None:
    model = shared_model()
    tracing = CausalTracing(MoELayerView(model), TOK, traced(model), [2], TraceSettings(noise=1e-9, samples=2))
    torch.testing.assert_close(tracing.corrupted, tracing.clean[:, None].expand(-1, 2))
    assert tracing.layer(2).effect.mean == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("family", ["qwen3_moe", "modulelist"])
def test_the_model_is_as_before(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    before = state_of(model)
    tracing = CausalTracing(MoELayerView(model), TOK, traced(model), [1, 2], SETTINGS)
    tracing.layer(1)
    tracing.experts(2)
    assert_same_state(before, state_of(model))

    def broken(*_: object) -> Tensor:
        raise RuntimeError("in the middle of a forward")

    with pytest.raises(RuntimeError, match="in the middle"):
        tracing._probabilities(torch.arange(3), tracing.view.layers[1].output_site, broken)
    assert_same_state(before, state_of(model))


def test_refusals() -> None:
    view = MoELayerView(shared_model("deepseek_v3"))
    found = traced(view.model)
    with pytest.raises(DataError, match="no fact to trace"):
        CausalTracing(view, TOK, [], [1], SETTINGS)
    for wrong in ({"samples": 0}, {"batch_size": 0}, {"noise": 0.0}, {"noise": float("nan")}, {"noise": float("inf")}):
        with pytest.raises(DataError, match="at least 1 and noise greater than 0"):
            TraceSettings(**wrong)
    with pytest.raises(LayerError, match="dense"):
        CausalTracing(view, TOK, found, [0], SETTINGS)


def test_the_traced_answer_is_the_model_s_own() -> None:
    model = shared_model()
    plain = [EvaluationRecord(request, (), ()) for request in facts(3)]
    found = traced_facts(model, TOK, plain, "subject_last")
    assert len(found) == 3
    for fact in found:
        best = model(input_ids=torch.tensor([[*fact.ids, *fact.answer[:-1]]])).logits[0, len(fact.ids) - 1 :].argmax(-1)
        assert fact.answer == tuple(best.tolist())
    unnamed = EvaluationRecord(EditRequest("It is cold in", None, "Rome"), (), ())
    assert len(traced_facts(model, TOK, [*plain, unnamed], "subject_last")) == len(found)


def test_padded_slots_do_not_count_as_routed() -> None:
    moe = MoELayerView(shared_model()).layers[1]
    hidden = torch.randn(1, 32)
    routing = Routing(hidden, torch.tensor([[3, 0]]), torch.tensor([[0.5, 0.0]]))
    assert not contributions(moe, routing, torch.tensor([[0]])).any()
    assert contributions(moe, routing, torch.tensor([[3]])).abs().sum() > 0
