"""CounterFact (Meng et al. 2022) as ROME stores it; as EasyEdit stores it, it is read by its columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easyedit_moe.facts.records.record import EvaluationRecord, Parsed, as_text, texts
from easyedit_moe.facts.requests import parse_request


def parse_rome_counterfact(item: Mapping[str, Any]) -> Parsed:
    """counterfact.json and multi_counterfact.json: requested_rewrite, paraphrase_prompts, neighborhood_prompts.

    The neighbours' answer is the true one of the edit; without one they have none.
    """
    request = parse_request({"requested_rewrite": worded_rewrite(item["requested_rewrite"])})
    prompts, true = texts(item.get("neighborhood_prompts")), request.ground_truth
    paraphrases = texts(item.get("paraphrase_prompts"))
    if true is None:
        return EvaluationRecord(request, paraphrases, (), unanswered=prompts), ()
    return EvaluationRecord(request, paraphrases, tuple((prompt, true) for prompt in prompts)), ()


def worded_rewrite(rewrite: Any) -> Any:
    """The rewrite with numbers as texts, and blank true answers and subjects left out."""
    if not isinstance(rewrite, Mapping):
        return rewrite
    said = dict(rewrite)
    for name in ("target_new", "target_true", "ground_truth", "subject"):
        value = said.get(name)
        value = as_text(value.get("str") if isinstance(value, Mapping) else value)
        said[name] = value
        if name != "target_new" and (value is None or (isinstance(value, str) and not value.strip())):
            del said[name]
    return said
