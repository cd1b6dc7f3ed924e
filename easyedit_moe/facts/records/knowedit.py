"""KnowEdit (Zhang et al. 2024): WikiData_counterfact, WikiData_recent, ZsRE, WikiBio in one layout, and Sanitation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from easyedit_moe.errors import DataError, RequestError, shown
from easyedit_moe.facts.records.record import Parsed, absent, grouped_record, request_of, texts

PORTABILITY = ("Reasoning", "Subject_Aliasing", "Logical_Generalization")
LOCALITY = ("Relation_Specificity", "Forgetfulness")
SANITATION = (("K_F", "K_R"), ("success", "locality"))


def parse_knowedit(item: Mapping[str, Any]) -> Parsed:
    """prompt, subject, target_new, ground_truth, rephrase_prompt, locality and portability by group; WikiBio says text,
    concept and labels instead of prompt, subject and target_new.

    Answers are a text, a list of alternatives, or a list of answers with their aliases. Of the groups, those count that
    the benchmark defines: `LOCALITY` and `PORTABILITY`.
    """
    request = request_of(
        item.get("prompt", item.get("text")),
        item.get("subject", item.get("concept")),
        item.get("target_new", item.get("labels")),
        item.get("ground_truth"),
    )
    paraphrases = texts(item.get("rephrase_prompt"))
    return grouped_record(
        request, paraphrases, _groups(item, "locality", LOCALITY), _groups(item, "portability", PORTABILITY)
    )


def is_sanitation(items: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether this is the content of a Sanitation file, which is a dict of two lists."""
    return isinstance(items, Mapping) and any(forget in items and keep in items for forget, keep in SANITATION)


def parse_sanitation(item: Mapping[str, Any]) -> Parsed:
    """One question to forget from `sanitation_items`: question, subject, ground_truth, target_new, retained."""
    request = request_of(*(item.get(name) for name in ("question", "subject", "target_new", "ground_truth")))
    return grouped_record(request, (), {"Retained": item["retained"]}, {})


def sanitation_items(items: Mapping[str, Any], where: str) -> list[Any]:
    """The questions to forget of a Sanitation file, each with its share of those to retain.

    The file keeps one list of questions to retain for all; they are dealt out in turn, so that each is asked once.

    Raises:
        DataError: something else than two lists.
    """
    forget, keep = next((items[a], items[b]) for a, b in SANITATION if a in items and b in items)
    if not all(isinstance(part, Sequence) and not isinstance(part, str) for part in (forget, keep)):
        raise DataError(f"{where}: a Sanitation file must hold two lists, of questions to forget and to retain.")
    retained = [_as_probe(question) for question in keep]
    return [
        {**item, "retained": retained[number :: len(forget)]} if isinstance(item, Mapping) else item
        for number, item in enumerate(forget)
    ]


def _as_probe(item: Any) -> Any:
    if not isinstance(item, Mapping):
        return item
    return {"prompt": item.get("question"), "ground_truth": item.get("ground_truth")}


def _groups(item: Mapping[str, Any], name: str, known: tuple[str, ...]) -> dict[str, Any]:
    groups = item.get(name)
    if absent(groups):
        return {}
    if not isinstance(groups, Mapping):
        raise RequestError(f"'{name}' must be a dict of groups; found {shown(groups)}.")
    return {group: groups[group] for group in known if group in groups}
