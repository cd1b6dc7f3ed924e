"""ZsRE (Levy et al. 2017; Mitchell et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easyedit_moe.errors import RequestError
from easyedit_moe.facts.records.record import EvaluationRecord, Parsed, ProbeGroup, absent, probe_groups, texts
from easyedit_moe.facts.requests import parse_request


def parse_zsre(item: Mapping[str, Any]) -> Parsed:
    """src, subject, alt, answers, rephrase, loc, loc_ans, and in some files portability ("New Question", ...)."""
    request = parse_request(
        {
            "prompt": item["src"],
            "subject": item["subject"],
            "target_new": item["alt"],
            "ground_truth": item["answers"],
        }
    )
    if request.ground_truth is None:
        raise RequestError("'ground_truth' is missing: 'answers' is empty.")
    (loc,), (loc_ans,) = texts([item["loc"]]), texts([item["loc_ans"]])
    portability, reasons = one_hop(item)
    return EvaluationRecord(request, texts([item["rephrase"]]), ((loc, loc_ans),), portability=portability), reasons


def one_hop(item: Mapping[str, Any]) -> tuple[tuple[ProbeGroup, ...], tuple[str, ...]]:
    """The question one step away from the edit that the portability files of CounterFact and ZsRE add."""
    found = item.get("portability")
    if absent(found) or found == {}:
        return (), ()
    if not isinstance(found, Mapping):
        return (), (f"portability: must be a dict; found {found!r}.",)
    reasons: list[str] = []
    probe = {"prompt": found.get("New Question"), "ground_truth": found.get("New Answer")}
    return probe_groups({"one_hop": probe}, reasons), tuple(reasons)
