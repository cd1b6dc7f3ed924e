"""Routing of fact tokens: sets, their similarity, and which prompts are compared."""

from __future__ import annotations

import pytest
import torch
from tiny import assert_same_state, shared_model, state_of, tiny_model, tiny_tokenizer

from easyedit_moe.facts.records import EvaluationRecord
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.facts.tokens import Prompt
from easyedit_moe.localisation.prompts import neighbours_alike, other_subject, paraphrased, phrasings
from easyedit_moe.localisation.routing import fact_experts, jaccard, routing_alikeness
from easyedit_moe.moe.capture import capture_facts
from easyedit_moe.moe.layers import MoELayerView

TOK = tiny_tokenizer()


def record(
    prompt: str, subject: str, paraphrases: tuple[str, ...] = (), near: tuple[str, ...] = ()
) -> EvaluationRecord:
    return EvaluationRecord(EditRequest(prompt, subject, "Rome"), paraphrases, tuple((text, "Paris") for text in near))


@pytest.mark.parametrize(
    ("prompt", "subject", "text", "found"),
    [
        ("The capital of France is", "France", "The capital of Peru is", "Peru"),
        ("The capital of France is", "France", "The capital of South Korea is", "South Korea"),
        ("France lies in", "France", "Peru lies in", "Peru"),
        ("The capital of France is", "France", "The capital of  is", None),
        ("The capital of France is", "France", "Peru has the capital", None),
        ("The capital of France is", "France", "The capital of France", None),
        ("He lives in Rome", "Rome", "He lives in Ana's Rome", "Ana's Rome"),
    ],
)
def test_other_subject(prompt: str, subject: str, text: str, found: str | None) -> None:
    assert other_subject(prompt, subject, text) == found


def test_which_prompts_are_compared() -> None:
    one = record("Lyon lies in", "Lyon", ("They say Lyon is in", "It lies in"), ("Paris lies in", "Where is Paris?"))
    assert [TOK.decode(p.ids[: p.fact + 1]) for p in phrasings(TOK, one, "subject_last")] == ["Lyon", "They say Lyon"]
    assert [TOK.decode(p.ids[: p.fact + 1]) for p in neighbours_alike(TOK, one, "subject_last")] == ["Paris"]
    assert len(neighbours_alike(TOK, one, "last")) == 2
    assert [request.prompt for request in paraphrased(one)] == ["They say Lyon is in"]


def test_jaccard() -> None:
    one = torch.tensor([[True, True, False, False], [False, False, False, False]])
    other = torch.tensor([[True, False, True, False], [False, False, False, False]])
    assert jaccard(one, other).tolist() == pytest.approx([1 / 3, 0])


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist"])
def test_the_sets_are_those_of_an_edit_s_keys(family: str) -> None:
    view = MoELayerView(shared_model(family))
    prompts = [Prompt((5, 9, 12, 44), 2), Prompt((7, 8), 1), Prompt((30, 31, 32), 0)]
    found = fact_experts(view, prompts, [0, 2], 0, batch_size=2)
    keys = capture_facts(view, [p.ids for p in prompts], [p.fact for p in prompts], [0, 2], [2], 0).keys
    for layer in (0, 2):
        for row, (experts, gates) in enumerate(zip(keys[layer].expert, keys[layer].gate, strict=True)):
            assert set(torch.nonzero(found[layer][row]).squeeze(1).tolist()) == set(experts[gates != 0].tolist())


def test_alikeness_by_hand() -> None:
    model = tiny_model()
    before, view = state_of(model), MoELayerView(model)
    records = [
        record("Lyon lies in", "Lyon", ("Lyon is to be found in", "Today Lyon is in"), ("Paris lies in",)),
        record("Angola lies in", "Angola", (), ()),
        record("Zwolle lies in", "Zwolle", ("Zwolle is in",), ("Rome lies in", "Leiden lies in")),
    ]
    found = routing_alikeness(view, TOK, records, [1, 3], "subject_last", batch_size=2)
    assert_same_state(before, state_of(model))
    for one in found:

        def sets(prompts: list[Prompt], layer: int = one.layer) -> list[set[int]]:
            picked = fact_experts(view, prompts, [layer], 0)[layer]
            return [set(torch.nonzero(row).squeeze(1).tolist()) for row in picked]

        def alike(a: set[int], b: set[int]) -> float:
            return 100 * len(a & b) / len(a | b)

        own = [sets(phrasings(TOK, r, "subject_last")) for r in records]
        near = [sets(neighbours_alike(TOK, r, "subject_last")) for r in records if r.neighbours]
        phrased = [sum(alike(g[0], b) for b in g[1:]) / len(g[1:]) for g in own if len(g) > 1]
        assert one.phrasings.mean == pytest.approx(sum(phrased) / 2)
        assert one.phrasings.count == 2
        close = [sum(alike(own[i][0], b) for b in g) / len(g) for i, g in zip((0, 2), near, strict=True)]
        assert one.neighbours.mean == pytest.approx(sum(close) / 2)
        others = [sum(alike(own[i][0], own[j][0]) for j in range(3) if j != i) / 2 for i in range(3)]
        assert one.others.mean == pytest.approx(sum(others) / 3)
        assert one.experts == len(set().union(*(s for g in own for s in g)))


def test_a_lone_fact_without_other_prompts() -> None:
    (found,) = routing_alikeness(MoELayerView(shared_model()), TOK, [record("Lyon lies in", "Lyon")], [0], "last")
    assert (found.phrasings.count, found.neighbours.count, found.others.count) == (0, 0, 0)
