"""MQuAKE (Zhong et al. 2023): cases of one to four edits, and multi-hop questions that follow from all of a case's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from easyedit_moe.facts.records.counterfact import worded_rewrite
from easyedit_moe.facts.records.record import Parsed, grouped_record, probe, texts
from easyedit_moe.facts.requests import parse_request


def mquake_items(items: Sequence[Any], numbers: Sequence[int]) -> tuple[list[Any], list[int]]:
    """One item per edit instead of one per case, with the numbers of their cases.

    Cases share edits, which can be made only once: the first counts. The questions of a case stand with its last edit,
    wherever that was first; they are right once all edits of the case are made, so score after all of them.
    """
    out: list[Any] = []
    found: list[int] = []
    places: dict[tuple[str, str, str], int] = {}
    for number, item in zip(numbers, items, strict=True):
        rewrites = item.get("requested_rewrite") if isinstance(item, Mapping) else None
        if not isinstance(rewrites, Sequence) or isinstance(rewrites, str) or not rewrites:
            out.append(item)
            found.append(number)
            continue
        for place, rewrite in enumerate(rewrites):
            key = _key(rewrite)
            if key not in places:
                places[key] = len(out)
                out.append({"rewrite": rewrite, "cases": []})
                found.append(number)
            if place == len(rewrites) - 1:
                out[places[key]]["cases"].append(item)
    return out, found


def _key(rewrite: Any) -> tuple[str, str, str]:
    said = rewrite if isinstance(rewrite, Mapping) else {"prompt": rewrite}
    return str(said.get("prompt")), str(said.get("subject")), str(said.get("target_new"))


def parse_mquake(item: Mapping[str, Any]) -> Parsed:
    """One edit of `mquake_items`: ROME's rewrite with ``question`` as paraphrase; portability by group.

    "multi_hop": ``questions`` with ``new_answer`` and its aliases; "single_hops": the facts of the chain as they are
    after the edits. Locality is there where AKEW added ``loc`` and ``loc_ans``.
    """
    rewrite = item["rewrite"]
    request = parse_request({"requested_rewrite": worded_rewrite(rewrite)})
    multi, single, near = [], [], []
    for case in item["cases"]:
        answers = [case.get("new_answer"), case.get("new_answer_alias")]
        multi += [probe(question, answers) for question in texts(case.get("questions"))]
        for hop in case.get("new_single_hops") or []:
            if hop.get("question") != rewrite.get("question"):
                single.append(probe(hop.get("question"), [hop.get("answer"), hop.get("answer_alias")]))
        if case.get("loc"):
            near.append(probe(case["loc"], case.get("loc_ans")))
    portability = {"multi_hop": multi, "single_hops": single}
    return grouped_record(request, texts(rewrite.get("question")), {"locality": near}, portability)
