"""WikiBigEdit (Thede et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easyedit_moe.facts.records.record import Parsed, absent, grouped_record, request_of, texts


def parse_wikibigedit(item: Mapping[str, Any]) -> Parsed:
    """update, subject, ans, rephrase, and where they exist personas (the edit asked in another voice), mhop and
    mhop_ans (a question over several hops), loc and loc_ans.

    Groups carry the names that EasyEdit's example gives them: "locality", "personas", "mhop".
    """
    request = request_of(item["update"], item.get("subject"), item["ans"], item.get("ground_truth"))
    portability = {
        "personas": _probe(item.get("personas"), request.target_new),
        "mhop": _probe(item.get("mhop"), item.get("mhop_ans")),
    }
    locality = {"locality": _probe(item.get("loc"), item.get("loc_ans"))}
    return grouped_record(request, texts(item.get("rephrase")), locality, portability)


def _probe(prompt: Any, answers: Any) -> dict[str, Any] | None:
    return None if absent(prompt) else {"prompt": prompt, "ground_truth": answers}
