"""RippleEdits (Cohen et al. 2023): an edit as one sentence, and tests of what it should and should not change."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from easyedit_moe.errors import RequestError
from easyedit_moe.facts.records.record import Parsed, grouped_record, probe, request_of

LOCALITY = ("Relation_Specificity", "Relation_Specifity", "Forgetfulness")  # the second is how its README has it
PORTABILITY = ("Logical_Generalization", "Subject_Aliasing", "Compositionality_I", "Compositionality_II")

_SENTENCE = re.compile(r"(.+ (?:is|are|follows|followed by)) (.+?)\.?", re.S)
_RELATION = (
    r"(?:country of citizenship|field of work|head of government|head of state|place of birth|place of death"
    r"|place of burial|date of birth|date of death|.+?)"
)
_SUBJECTS = tuple(
    re.compile(pattern, re.S)
    for pattern in (
        r".* which (.+) (?:is associated with|is a member of|plays in|is part of|is the capital of) is",
        r"The number of children (.+) has is",
        r"The name of the award (.+) won is",
        r"(.+) (?:follows|is followed by)",
        r".* (?:held by|performed in|currency in) (.+) is",
        rf"The (?:names? of the )?{_RELATION} of (.+) (?:is|are)",
    )
)


def parse_rippleedits(item: Mapping[str, Any]) -> Parsed:
    """Edit (prompt, original_fact) and six lists of tests, each with test_queries of prompt and answers.

    The layout names subject and target by Wikidata's ids only, so both are taken from the sentence: the target stands
    behind its last "is", "are", "follows" or "followed by", the subject where the benchmark's phrases have it. Aliases
    are right answers, too. Conditions, which say on which models a test counts, are not looked at.
    """
    prompt, target = _split(item["edit"])
    original = item["edit"].get("original_fact")
    old = _split(original) if isinstance(original, Mapping) else ("", None)
    request = request_of(prompt, _subject(prompt), target, old[1] if old[0] == prompt else None)
    return grouped_record(request, (), _tests(item, LOCALITY), _tests(item, PORTABILITY))


def _split(edit: Any) -> tuple[str, str]:
    sentence = edit.get("prompt") if isinstance(edit, Mapping) else None
    if not isinstance(sentence, str):
        raise RequestError(f"'edit' must be a dict with a sentence as 'prompt'; found {edit!r}.")
    found = _SENTENCE.fullmatch(sentence.strip())
    if found is None:
        raise RequestError(f"{sentence!r} does not end with 'is', 'are' or 'follows' and a target.")
    return found[1], found[2]


def _subject(prompt: str) -> str | None:
    return next((found[1] for pattern in _SUBJECTS if (found := pattern.fullmatch(prompt))), None)


def _tests(item: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for name in names:
        queries = [query for test in item.get(name) or [] for query in test.get("test_queries") or []]
        groups[name] = [
            probe(query.get("prompt"), [[one.get("value"), one.get("aliases")] for one in query.get("answers") or []])
            for query in queries
        ]
    return {name: probes for name, probes in groups.items() if probes}
