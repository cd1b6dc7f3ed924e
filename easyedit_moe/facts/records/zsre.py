"""ZsRE (Levy et al. 2017; Mitchell et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easyedit_moe.errors import RequestError, shown
from easyedit_moe.facts.records.record import (
    EvaluationRecord,
    Parsed,
    ProbeGroup,
    absent,
    alternatives,
    probe_groups,
    request_of,
    texts,
)


def parse_zsre(item: Mapping[str, Any]) -> Parsed:
    """src, subject, alt, answers, rephrase, loc, loc_ans, and in some files portability ("New Question", ...)."""
    request = request_of(item["src"], item.get("subject"), item["alt"], item.get("answers"))
    portability, reasons = one_hop(item)
    prompts, answers = texts(item.get("loc")), alternatives(item.get("loc_ans"))
    if len(prompts) > 1:
        raise RequestError(f"'loc' must be one prompt; found {len(prompts)}.")
    neighbours = tuple((prompt, answers[0]) for prompt in prompts if answers)
    record = EvaluationRecord(
        request,
        texts(item.get("rephrase")),
        neighbours,
        portability=portability,
        unanswered=() if answers else prompts,
    )
    return record, reasons


def one_hop(item: Mapping[str, Any]) -> tuple[tuple[ProbeGroup, ...], tuple[str, ...]]:
    """The question one step away from the edit that the portability files of CounterFact and ZsRE add."""
    found = item.get("portability")
    if absent(found) or found == {}:
        return (), ()
    if not isinstance(found, Mapping):
        return (), (f"portability: must be a dict; found {shown(found)}.",)
    reasons: list[str] = []
    probe = {"prompt": found.get("New Question"), "ground_truth": found.get("New Answer")}
    return probe_groups({"one_hop": probe}, reasons), tuple(reasons)
