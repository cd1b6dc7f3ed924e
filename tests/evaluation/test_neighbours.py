"""Neighbours without an answer keep the unedited model's, and portability counts the best of several answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from baselines import TOK
from tiny import assert_same_state, requests, state_of, tiny_model, tiny_tokenizer

from easyedit_moe import load_model
from easyedit_moe.evaluation.metrics import Score, evaluate
from easyedit_moe.evaluation.neighbours import ANSWER_TOKENS, answered
from easyedit_moe.evaluation.portability import portability
from easyedit_moe.evaluation.scoring import score_targets
from easyedit_moe.facts.records import EvaluationRecord, Probe, ProbeGroup, load_records
from easyedit_moe.facts.requests import parse_requests

PROMPT = "Zoë lives in"


def record(**changes: object) -> EvaluationRecord:
    (request,) = parse_requests(requests(1))
    return replace(EvaluationRecord(request, (), (("Angola is in", "Africa"),), unanswered=(PROMPT,)), **changes)


def greedy(model: torch.nn.Module, prompt: str) -> str:
    ids = TOK(prompt)["input_ids"]
    start = len(ids)
    for _ in range(ANSWER_TOKENS):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return TOK.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist"])
def test_the_answer_is_the_models_own(family: str) -> None:
    model = tiny_model(family)
    model.train()
    state = state_of(model)
    (found,) = answered(model, TOK, [record()])
    assert_same_state(state, state_of(model))
    said = greedy(model.eval(), PROMPT)
    assert found.neighbours == (("Angola is in", "Africa"), (PROMPT, said.strip().splitlines()[0].strip()))
    assert found.unanswered == ()
    assert answered(model, TOK, [found])[0] is found


def test_a_model_that_says_nothing_leaves_the_prompt_unanswered() -> None:
    class Silent(torch.nn.Module):
        def get_input_embeddings(self) -> torch.nn.Module:
            return torch.nn.Embedding(1, 1)

        def generate(self, input_ids: torch.Tensor, **options: object) -> torch.Tensor:
            return torch.cat([input_ids, torch.zeros(1, 1, dtype=torch.long)], dim=1)

    (found,) = answered(Silent(), tiny_tokenizer(), [record()])
    assert (found.unanswered, len(found.neighbours)) == ((PROMPT,), 1)


def test_specificity_counts_what_changed() -> None:
    model, tok = load_model("factworld", "float32")
    given = load_records("factworld").records[0]
    prompts = tuple(prompt for prompt, _ in given.neighbours)
    records = answered(model, tok, [replace(given, neighbours=(), unanswered=prompts)])
    assert evaluate(model, tok, records, "token_accuracy").specificity == Score.of([1.0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert evaluate(model, tok, records, "token_accuracy").specificity.mean < 60


def test_portability_counts_the_best_answer() -> None:
    model = tiny_model()
    probes = (Probe(PROMPT, ("Paris", "Rome")), Probe("Angola is in", ("Africa",)))
    records = [record(portability=(ProbeGroup("a", probes[:1]), ProbeGroup("b", probes[1:]))), record()]
    pairs = [(PROMPT, "Paris"), (PROMPT, "Rome"), ("Angola is in", "Africa")]
    paris, rome, africa = (score.token_accuracy for score in score_targets(model, TOK, pairs))
    found = portability(model, TOK, records)
    assert found.count == 1
    assert found.mean == pytest.approx(100 * (max(paris, rome) + africa) / 2)
    assert portability(model, TOK, [record()]).count == 0
