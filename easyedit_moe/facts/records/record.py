"""What a record is, and how prompts and answers are read whatever the layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from easyedit_moe.errors import RequestError, shown
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.facts.texts import check_encodable

PROTOCOLS: Mapping[str, str] = {
    "counterfact": "probability comparison of the new and the true answer",
    "zsre": "ZsRE as published (MEMIT, MoEEdit): edits to the record's first right answer, '?' behind locality "
    "prompts, teacher-forced accuracy per token",
    "zsre-alternative": "ZsRE with edits to the record's alternative answer (EasyEdit's target), teacher-forced "
    "accuracy per token",
    "token_accuracy": "teacher-forced token accuracy",
    "unstructured": "edits to a whole text, teacher-forced accuracy per token",
}
"""How a record is judged, by name. All but "counterfact" are one judge; the two of ZsRE differ in what is edited and
asked, which `easyedit_moe.facts.records.zsre` reads from the same file."""


@dataclass(frozen=True)
class Probe:
    """A prompt and its right answers, the usual one first, none of them blank."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class ProbeGroup:
    """Probes of one kind, under the name that the benchmark gives it ("Reasoning", "Relation_Specificity", ...)."""

    name: str
    probes: tuple[Probe, ...]


@dataclass(frozen=True)
class EvaluationRecord:
    """One edit and the prompts by which it is judged.

    Attributes:
        request: the edit.
        paraphrases: prompts that ask the same.
        neighbours: prompts that must keep their answer, with that answer: all of them, whatever their group.
        locality: the neighbours by group with all their answers; empty where the layout knows no groups.
        portability: prompts whose answers follow from the edit, by group.
        unanswered: prompts that must keep their answer, where the file does not say which; it is the unedited model's
            (see `easyedit_moe.evaluation.neighbours.answered`).
    """

    request: EditRequest
    paraphrases: tuple[str, ...]
    neighbours: tuple[tuple[str, str], ...]
    locality: tuple[ProbeGroup, ...] = ()
    portability: tuple[ProbeGroup, ...] = ()
    unanswered: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecordSet:
    """Usable records of a file and what was left out.

    Attributes:
        records: in the file's order.
        protocol: the one of `PROTOCOLS` that the layout calls for; "token_accuracy" where it calls for a comparison
            with true answers and most records have none.
        skipped: (number, reason) of each record that can't be used.
        dropped: (number, reason) of each probe that a usable record lost because it has no answer or is malformed.
        unit: what the numbers count: "record" (of a JSON list, from 0) or "line" (of the file, from 1).
    """

    records: tuple[EvaluationRecord, ...]
    protocol: str
    skipped: tuple[tuple[int, str], ...]
    dropped: tuple[tuple[int, str], ...] = ()
    unit: str = "record"


@dataclass(frozen=True)
class FactSet:
    """The facts of a file that can be edited together, and what was left out.

    Attributes:
        facts: in the file's order; subject, ground truth and the prompts to judge by are there where the file has
            them. No two have the same prompt.
        numbers: of each fact.
        protocol: the one of `PROTOCOLS` by which the facts can be judged.
        skipped: (number, reason) of each fact that can't be used, or that repeats or contradicts an earlier one.
        dropped: (number, reason) of each probe that a usable fact lost because it has no answer or is malformed.
        unknown_columns: columns (keys) of the file that are not used.
        unit: what the numbers count: "record" (of a JSON list, from 0) or "line" (of the file, from 1).
    """

    facts: tuple[EvaluationRecord, ...]
    numbers: tuple[int, ...]
    protocol: str
    skipped: tuple[tuple[int, str], ...] = ()
    dropped: tuple[tuple[int, str], ...] = ()
    unknown_columns: tuple[str, ...] = ()
    unit: str = "record"


Parsed = tuple[EvaluationRecord, tuple[str, ...]]
"""What the parser of a layout returns: a record, and the reason for each probe that it lost."""


def grouped_record(
    request: EditRequest, paraphrases: tuple[str, ...], locality: Mapping[str, Any], portability: Mapping[str, Any]
) -> Parsed:
    """A record whose probes come in named groups; each group holds dicts with "prompt" and "ground_truth"."""
    reasons: list[str] = []
    kept, follow = probe_groups(locality, reasons), probe_groups(portability, reasons)
    neighbours = tuple((probe.prompt, probe.answers[0]) for group in kept for probe in group.probes)
    return EvaluationRecord(request, paraphrases, neighbours, kept, follow), tuple(reasons)


def probe(prompt: Any, answers: Any) -> dict[str, Any]:
    """A probe as `probe_groups` reads it, whatever the layout calls its prompt and answers."""
    return {"prompt": prompt, "ground_truth": answers}


def request_of(prompt: Any, subject: Any, target_new: Any, ground_truth: Any) -> EditRequest:
    """The edit that a record asks for; of several true answers the first counts, and numbers are texts.

    Raises:
        RequestError: a prompt or target that is no text, or a subject that is not in the prompt.
    """
    known = None if absent(subject) else as_text(subject)
    return EditRequest(prompt, known, as_text(target_new), first_answer(ground_truth))


def as_text(value: Any) -> Any:
    """A number as the text that it was written as; everything else, booleans included, as it is."""
    number = isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) and value == value
    return str(value) if number else value


def texts(value: Any) -> tuple[str, ...]:
    """Nothing, one text or a list of texts as a tuple.

    Raises:
        RequestError: something else, or a blank text in a list.
    """
    listed = () if absent(value) else (value,) if isinstance(value, str) else value
    if not isinstance(listed, Sequence) or not all(isinstance(text, str) for text in listed):
        raise RequestError(f"Prompts and answers must be strings; found {shown(value)}.")
    if not all(text.strip() for text in listed):
        raise RequestError(f"Prompts and answers must not be blank; found {shown(value)}.")
    for text in listed:
        check_encodable("prompt or answer", text)
    return tuple(listed)


NESTED = 8
"""Lists within lists in which answers may stand; benchmarks have three."""


def alternatives(value: Any, depth: int = 0) -> tuple[str, ...]:
    """The right answers in a text, or in a list of answers each of which may be a list of its aliases.

    Blank answers and repetitions are left out; a number is a text.

    Raises:
        RequestError: a leaf that is neither a string nor a number, or lists that are nested deeper than `NESTED`.
    """
    value = as_text(value)
    if absent(value):
        return ()
    if isinstance(value, str):
        check_encodable("answer", value)
        return (value,)
    if isinstance(value, (Mapping, bytes)) or not isinstance(value, Sequence) or depth == NESTED:
        raise RequestError(f"Answers must be strings or lists of strings; found {shown(value)}.")
    return tuple(dict.fromkeys(answer for part in value for answer in alternatives(part, depth + 1)))


def absent(value: Any) -> bool:
    """None, a blank text, or the NaN that a table of pandas leaves in JSON where a text is missing."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and value != value)


def first_answer(value: Any) -> str | None:
    """The usual one of `alternatives`, if any."""
    return next(iter(alternatives(value)), None)


def probe_groups(groups: Mapping[str, Any], reasons: list[str]) -> tuple[ProbeGroup, ...]:
    """The usable probes of each group, groups without one left out; ``reasons`` gets why each other one is not."""
    out = []
    for name, entries in groups.items():
        if absent(entries):
            continue
        listed = [entries] if isinstance(entries, Mapping) else entries
        if isinstance(listed, str) or not isinstance(listed, Sequence):
            reasons.append(f"{name}: must be a list of probes; found {shown(listed)}.")
            continue
        probes: list[Probe] = []
        for entry in listed:
            try:
                probes += _probes(entry)
            except RequestError as error:
                reasons.append(f"{name}: {error}")
        if probes:
            out.append(ProbeGroup(name, tuple(probes)))
    return tuple(out)


def _probes(entry: Any) -> list[Probe]:
    """One probe, or several where "prompt" is a list: its n-th prompt then goes with the n-th of as many answers."""
    if not isinstance(entry, Mapping):
        raise RequestError(f"A probe must be a dict with 'prompt' and 'ground_truth'; found {shown(entry)}.")
    prompts = texts(entry.get("prompt"))
    truth: Any = entry.get("ground_truth")
    if not prompts:
        raise RequestError("'prompt' is missing.")
    paired = len(prompts) > 1 and not isinstance(truth, str) and isinstance(truth, Sequence)
    if paired and len(truth) != len(prompts):
        raise RequestError(f"{len(prompts)} prompts, but {len(truth)} answers.")
    truths = truth if paired else [truth] * len(prompts)
    probes = [Probe(prompt, alternatives(answers)) for prompt, answers in zip(prompts, truths, strict=True)]
    for probe in probes:
        if not probe.answers:
            raise RequestError(f"{probe.prompt!r} has no answer.")
    return probes
