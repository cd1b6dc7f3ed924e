"""CounterFact (Meng et al. 2022), as ROME and as EasyEdit store it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easyedit_moe.errors import RequestError
from easyedit_moe.facts.records.record import EvaluationRecord, Parsed, texts
from easyedit_moe.facts.records.zsre import one_hop
from easyedit_moe.facts.requests import EditRequest, parse_request


def parse_rome_counterfact(item: Mapping[str, Any]) -> Parsed:
    """counterfact.json and multi_counterfact.json: requested_rewrite, paraphrase_prompts, neighborhood_prompts."""
    request = parse_request(item)
    true = _true_answer(request, "target_true")
    neighbours = tuple((prompt, true) for prompt in texts(item["neighborhood_prompts"]))
    return EvaluationRecord(request, texts(item["paraphrase_prompts"]), neighbours), ()


def parse_easyedit_counterfact(item: Mapping[str, Any]) -> Parsed:
    """What CounterFactDataset reads: prompt, subject, target_new, ground_truth, rephrase_prompt, locality_prompt,
    locality_ground_truth, and in some files portability ("New Question", "New Answer").
    """
    request = parse_request(item)
    _true_answer(request, "ground_truth")
    prompts, answers = texts(item.get("locality_prompt")), texts(item.get("locality_ground_truth"))
    if len(prompts) != len(answers):
        raise RequestError(f"{len(prompts)} locality prompts, but {len(answers)} answers.")
    neighbours = tuple(zip(prompts, answers, strict=True))
    portability, reasons = one_hop(item)
    record = EvaluationRecord(request, texts(item.get("rephrase_prompt")), neighbours, portability=portability)
    return record, reasons


def _true_answer(request: EditRequest, name: str) -> str:
    """The answer that the new one is compared with; RequestError where the key ``name`` gave none."""
    if request.ground_truth is None or not request.ground_truth.strip():
        raise RequestError(f"'{name}' is missing.")
    return request.ground_truth
