"""ZsRE (Levy et al. 2017; Mitchell et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from easyedit_moe.facts.requests import EditRequest


def parse_zsre(item: Mapping[str, Any]) -> Parsed:
    """As published (MEMIT's and MoEEdit's readers): the edit writes the first of ``answers``, which is true.

    What the model said before is not known, so there is no ground truth. ``loc`` lacks its question mark in the
    published file and gets one; ``alt`` and ``pred`` are not used.
    """
    answers = alternatives(item["answers"])
    if not answers:
        raise RequestError("'answers' is empty; the protocol zsre edits to its first one.")
    return _record(item, request_of(item["src"], item.get("subject"), answers[0], None), _as_question)


def parse_zsre_alternative(item: Mapping[str, Any]) -> Parsed:
    """With a counterfactual edit, as EasyEdit's dataset has it: ``alt`` is written, and the first of ``answers`` is the
    ground truth; ``loc`` is asked as it stands.
    """
    return _record(item, request_of(item["src"], item.get("subject"), item["alt"], item.get("answers")), str)


def _record(item: Mapping[str, Any], request: EditRequest, asked: Callable[[str], str]) -> Parsed:
    """rephrase, loc, loc_ans, and in some files portability ("New Question", ...)."""
    portability, reasons = one_hop(item)
    prompts, answers = tuple(asked(text) for text in texts(item.get("loc"))), alternatives(item.get("loc_ans"))
    if len(prompts) > 1:
        raise RequestError(f"'loc' must be one prompt; found {len(prompts)}.")
    record = EvaluationRecord(
        request,
        texts(item.get("rephrase")),
        tuple((prompt, answers[0]) for prompt in prompts if answers),
        portability=portability,
        unanswered=() if answers else prompts,
    )
    return record, reasons


def _as_question(text: str) -> str:
    return text if text.rstrip().endswith("?") else text + "?"


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
