"""Facts by columns: prompt, subject, target_new, and what else a table or a list of dicts says of them.

EasyEdit's CounterFact is of this kind, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from easyedit_moe.errors import RequestError, did_you_mean
from easyedit_moe.facts.records.record import (
    EvaluationRecord,
    Parsed,
    Probe,
    ProbeGroup,
    absent,
    alternatives,
    probe_groups,
    request_of,
    texts,
)
from easyedit_moe.facts.records.zsre import one_hop
from easyedit_moe.facts.requests import EditRequest, parse_request

ALIASES: Mapping[str, tuple[str, ...]] = {
    "prompt": ("question",),
    "subject": (),
    "target_new": ("target", "new_target", "answer", "new_answer"),
    "ground_truth": ("target_true", "true_target", "old_target", "old_answer", "true_answer"),
    "rephrase": (
        "rephrases", "rephrasing", "rephrasings", "rephrase_prompt", "rephrase_prompts", "paraphrase", "paraphrases",
        "paraphrase_prompt", "paraphrase_prompts",
    ),
    "neighbours": (
        "neighbour", "neighbor", "neighbors", "neighbourhood", "neighborhood", "neighbourhood_prompts",
        "neighborhood_prompts", "neighbourhood_prompt", "neighborhood_prompt", "locality", "locality_prompt",
        "locality_prompts",
    ),
    "neighbour_answers": (
        "neighbour_answer", "neighbor_answer", "neighbor_answers", "locality_ground_truth", "locality_answer",
        "locality_answers",
    ),
    "portability": ("portability_prompt", "portability_prompts"),
    "portability_answers": ("portability_answer", "portability_ground_truth"),
}  # fmt: skip
"""What each column may also be called."""
LISTS = ("rephrase", "neighbours", "neighbour_answers", "portability", "portability_answers")
"""Columns that take one text or several."""
UNUSED = ("case_id",)
"""Columns that are known and not needed."""

_COLUMN = {alias: column for column, aliases in ALIASES.items() for alias in (column, *aliases)}
_WITH_ANSWER = re.compile(r"(.*\S)\s+=>\s+(\S.*)", re.S)
_ANSWER_KEYS = ("answer", "ground_truth", "target", "answers")


def column_of(name: str) -> str | None:
    """The column that a header or key means, whatever its case, spaces and a number behind it; None where unknown."""
    plain = re.sub(r"[\s\-]+", "_", name.strip().lower())
    numbered = re.sub(r"_?\d+$", "", plain)
    found = _COLUMN.get(plain) or _COLUMN.get(numbered)
    return found if plain in _COLUMN or found in LISTS else None


def is_columns(item: Mapping[str, Any]) -> bool:
    """Whether these are the keys of a fact by columns."""
    return {"prompt", "target_new"} <= {column_of(str(key)) for key in item}


def unknown_columns(items: Iterable[Any]) -> tuple[str, ...]:
    """Keys of facts by columns that mean nothing here, each once."""
    keys = dict.fromkeys(str(key) for item in items if isinstance(item, Mapping) for key in item)
    return tuple(key for key in keys if column_of(key) is None and key not in UNUSED)


def unknown_message(names: Iterable[str], where: str) -> str:
    """What is said of columns that are not used."""
    named = ", ".join(
        repr(name) + did_you_mean(name, _COLUMN).replace(" Did", " (did").replace("?", "?)") for name in names
    )
    return f"{where}: unknown columns, which are not used: {named}. Known: {', '.join(ALIASES)}."


def parse_columns(item: Mapping[str, Any]) -> Parsed:
    """A fact by columns; see `ALIASES` for their names.

    Rephrasings, neighbours and portability are one text or a list. A neighbour or portability prompt is a text "prompt
    => answer", a dict with "prompt" and "answer", or a text whose answer stands in the column of answers. A neighbour
    may have no answer. Numbers are texts where an answer or a subject is expected.
    """
    values = _by_column(item)
    request = _request(values, item)
    reasons: list[str] = []
    answered, unanswered, locality = _neighbours(values, reasons)
    portability = _portability(values, item, reasons)
    record = EvaluationRecord(
        request, texts(values.get("rephrase")), answered, locality, portability, unanswered=unanswered
    )
    return record, tuple(reasons)


def _by_column(item: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the column that their keys mean; what is absent is left out.

    Raises:
        RequestError: two keys give one text in two ways.
    """
    values: dict[str, Any] = {}
    said: dict[str, str] = {}
    for key, value in item.items():
        column = column_of(str(key))
        if column is None or absent(value) or value in ([], {}):
            continue
        if column in LISTS and column in values:
            value = [*_listed(values[column]), *_listed(value)]
        elif column in values and values[column] != value:
            raise RequestError(f"{said[column]!r} and {key!r} both give {column}; keep one of them.")
        values[column], said[column] = value, str(key)
    return values


def _request(values: Mapping[str, Any], item: Mapping[str, Any]) -> EditRequest:
    if any(isinstance(values.get(name), Mapping) for name in ("target_new", "ground_truth")):
        return parse_request(item)  # ROME's dict, not nested
    return request_of(*(values.get(name) for name in ("prompt", "subject", "target_new", "ground_truth")))


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


_Neighbours = tuple[tuple[tuple[str, str], ...], tuple[str, ...], tuple[ProbeGroup, ...]]


def _neighbours(values: Mapping[str, Any], reasons: list[str]) -> _Neighbours:
    """Neighbours with an answer, neighbours without one, and their groups where they come in groups."""
    given = values.get("neighbours")
    if isinstance(given, Mapping) and "prompt" not in given:
        groups = probe_groups(given, reasons)
        return tuple((p.prompt, p.answers[0]) for group in groups for p in group.probes), (), groups
    probes = _probes(given, values.get("neighbour_answers"), "locality prompts")
    answered = tuple((prompt, answers[0]) for prompt, answers in probes if answers)
    return answered, tuple(prompt for prompt, answers in probes if not answers), ()


def _portability(values: Mapping[str, Any], item: Mapping[str, Any], reasons: list[str]) -> tuple[ProbeGroup, ...]:
    given = values.get("portability")
    if isinstance(given, Mapping) and "prompt" not in given:
        if given.keys() & {"New Question", "New Answer"}:
            groups, lost = one_hop(item)
            reasons += lost
            return groups
        return probe_groups(given, reasons)
    probes = []
    for prompt, answers in _probes(given, values.get("portability_answers"), "portability prompts"):
        if answers:
            probes.append(Probe(prompt, answers))
        else:
            reasons.append(f"portability: {prompt!r} has no answer. Write it as 'prompt => answer'.")
    return (ProbeGroup("portability", tuple(probes)),) if probes else ()


def _probes(given: Any, answers: Any, called: str) -> list[tuple[str, tuple[str, ...]]]:
    """Prompts with their answers, if any.

    Raises:
        RequestError: an entry that is neither a text nor a dict with a prompt, or answers that are not as many.
    """
    entries = [] if given is None else _listed(given)
    if answers is None:
        return [_probe(entry) for entry in entries]
    prompts, listed = texts(given), _listed(answers)
    if len(prompts) != len(listed):
        raise RequestError(f"{len(prompts)} {called}, but {len(listed)} answers.")
    return [(prompt, alternatives(answer)) for prompt, answer in zip(prompts, listed, strict=True)]


def _probe(entry: Any) -> tuple[str, tuple[str, ...]]:
    if isinstance(entry, Mapping):
        prompt = entry.get("prompt", entry.get("question"))
        found = next((entry[key] for key in _ANSWER_KEYS if not absent(entry.get(key))), None)
        (text,) = texts([prompt])
        return text, alternatives(found)
    (text,) = texts([entry])
    match = _WITH_ANSWER.fullmatch(text)
    return (match[1].strip(), (match[2].strip(),)) if match else (text, ())
