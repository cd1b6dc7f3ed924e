"""EasyEdit's datasets as our records, and our records as EasyEdit's requests."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from easyedit_moe.errors import DataError
from easyedit_moe.facts.records import EvaluationRecord, ProbeGroup, RecordSet, parse_records, read_json
from easyedit_moe.facts.records.record import Probe

Item = Mapping[str, Any]

KNOWEDIT_FIELDS = {
    "portability_r": ("portability", "Reasoning"),
    "portability_s": ("portability", "Subject_Aliasing"),
    "portability_l": ("portability", "Logical_Generalization"),
    "locality_rs": ("locality", "Relation_Specificity"),
    "locality_f": ("locality", "Forgetfulness"),
}
WIKIBIGEDIT_FIELDS = {
    "subject": "subject",
    "prompt": "update",
    "target_new": "ans",
    "ground_truth": "ground_truth",
    "rephrase": "rephrase",
    "portability_personas": "personas",
    "portability_hop": "mhop",
    "portability_hop_ans": "mhop_ans",
    "locality": "loc",
    "locality_ans": "loc_ans",
}
DROPPED_FIELDS = ("subject", "portability", "rephrase_prompt")
"""What the host drops of a file's record, and we read back."""
UNGROUPED = "neighborhood"
ZSRE_PROTOCOL = "zsre-alternative"
"""The locality group under which EasyEdit's own examples ask CounterFact's and ZsRE's neighbours."""


def records_from(dataset: Any, path: str | Path | None = None) -> RecordSet:
    """Records of an instance of EasyEdit's CounterFactDataset, ZsreDataset, KnowEditDataset or WikiBigEditDataset.

    The result is that of `easyedit_moe.facts.records.load_records` on the dataset's file, as far as the dataset
    goes: one that was given a ``size`` yields the records of the first ``size``. ZsreDataset edits to ``alt``, so its
    records are those of the protocol "zsre-alternative".

    ZsreDataset drops the subject, which is therefore read back from the file; KnowEditDataset drops
    ``rephrase_prompt``, which is read back where ``path`` is given and missing from the records otherwise. The other
    two keep all they read.

    Args:
        dataset: the instance; subclasses count, and so does anything indexable with the same items.
        path: the JSON file that the dataset was made from; by default the dataset's attribute ``data_dir``, if any.

    Raises:
        DataError: something else than these four datasets, an empty one, a ZsreDataset without its file, a file whose
            records are not the dataset's, or not one usable record.
    """
    items = _items(dataset)
    kind = _kind(dataset, items)
    where = f"the {kind}"
    path = path if path is not None else getattr(dataset, "data_dir", None)
    if kind == "CounterFactDataset":
        return parse_records(items, where)
    if kind == "WikiBigEditDataset":
        return parse_records([_raw_wikibigedit(item) for item in items], where)
    if kind == "KnowEditDataset":
        raws = [{**_raw_knowedit(item), "case_id": number} for number, item in enumerate(items)]
        return parse_records(raws, where) if path is None else _read_back(raws, path, where, _knowedit_key, False)
    if all("subject" in item for item in items):  # a host that has stopped dropping it
        raws = [{**_raw_zsre(item), "subject": item["subject"]} for item in items]
        return parse_records(raws, where, ZSRE_PROTOCOL)
    if path is None:
        raise DataError(
            "ZsreDataset drops the subject of each record, which editing needs. Pass path=, the JSON file that the "
            "dataset was made from."
        )
    return _read_back([_raw_zsre(item) for item in items], path, where, _zsre_key, True, ZSRE_PROTOCOL)


def easyedit_requests(records: Sequence[EvaluationRecord]) -> list[dict[str, Any]]:
    """Request dicts as BaseEditor.edit_requests expects them.

    Each has ``prompt``, ``target_new``, ``ground_truth`` (may be None), ``subject``, ``locality`` and ``portability``,
    both ``{name: {"prompt": [...], "ground_truth": [...]}}``, and ``rephrase_prompt`` where there is a paraphrase.
    EasyEdit asks one paraphrase and knows one answer to a question, so each gets the first of ours.
    """
    requests = []
    for record in records:
        request: dict[str, Any] = {
            "prompt": record.request.prompt,
            "target_new": record.request.target_new,
            "ground_truth": record.request.ground_truth,
            "subject": record.request.subject,
            "portability": _host_groups(record.portability),
            "locality": _host_groups(record.locality or _ungrouped(record)),
        }
        if record.paraphrases:
            request["rephrase_prompt"] = record.paraphrases[0]
        requests.append(request)
    return requests


def _ungrouped(record: EvaluationRecord) -> tuple[ProbeGroup, ...]:
    probes = tuple(Probe(prompt, (answer,)) for prompt, answer in record.neighbours)
    return (ProbeGroup(UNGROUPED, probes),) if probes else ()


def _host_groups(groups: Sequence[ProbeGroup]) -> dict[str, dict[str, list[str]]]:
    return {
        group.name: {
            "prompt": [probe.prompt for probe in group.probes],
            "ground_truth": [probe.answers[0] for probe in group.probes],
        }
        for group in groups
        if group.probes
    }


def _items(dataset: Any) -> list[Item]:
    try:
        items = [dataset[i] for i in range(len(dataset))]
    except (TypeError, KeyError) as error:
        raise DataError(f"Expected one of EasyEdit's datasets; found {type(dataset).__name__}.") from error
    if not items:
        raise DataError(f"The {type(dataset).__name__} is empty.")
    if not all(isinstance(item, Mapping) for item in items):
        raise DataError(f"Expected one of EasyEdit's datasets, of dicts; found {type(dataset).__name__}.")
    return items


_KEYS = {
    "WikiBigEditDataset": {"portability_personas", "portability_hop", "prompt", "subject", "target_new"},
    "KnowEditDataset": {"portability_r", "portability_s", "locality_rs", "prompt", "subject", "target_new"},
    "ZsreDataset": {"cond", "prompt", "target_new", "ground_truth", "locality_prompt", "locality_ground_truth"},
    "CounterFactDataset": {"prompt", "target_new", "subject", "ground_truth", "locality_prompt"},
}


def _kind(dataset: Any, items: Sequence[Item]) -> str:
    """By the name of the class or of one that it derives from, else by the keys of its items."""
    item, names = items[0], [base.__name__ for base in type(dataset).__mro__]
    kind = next((name for name in names if name in _KEYS), None)
    if kind is None and type(dataset).__module__.split(".")[0] != "easyeditor":
        kind = next((name for name, keys in _KEYS.items() if keys <= item.keys()), None)
        if kind is None and "requested_rewrite" in item:
            kind = "CounterFactDataset"
    if kind is None:
        raise DataError(
            f"Expected one of EasyEdit's {', '.join(reversed(_KEYS))}; found {names[0]} with the keys "
            f"{', '.join(sorted(map(str, item)))}."
        )
    if kind != "CounterFactDataset" and (missing := {key for item in items for key in _KEYS[kind] - item.keys()}):
        raise DataError(
            f"The items of this {kind} lack {', '.join(sorted(missing))}, so EasyEdit has changed; read its file with "
            "easyedit_moe.facts.records.load_records instead."
        )
    return kind


def _raw_wikibigedit(item: Item) -> dict[str, Any]:
    return {raw: item.get(name) for name, raw in WIKIBIGEDIT_FIELDS.items()}


def _raw_knowedit(item: Item) -> dict[str, Any]:
    """The record of the file without its paraphrase."""
    raw: dict[str, Any] = {name: item.get(name) for name in ("prompt", "subject", "target_new", "ground_truth")}
    raw |= {"portability": {}, "locality": {}}
    for field, (part, group) in KNOWEDIT_FIELDS.items():
        if item.get(field) is not None:
            raw[part][group] = item[field]
    return raw


def _raw_zsre(item: Item) -> dict[str, Any]:
    """The record of the file without its subject."""
    return {
        "case_id": item.get("case_id"),
        "src": item["prompt"],
        "alt": item["target_new"],
        "answers": [item["ground_truth"]],
        "rephrase": item.get("rephrase_prompt"),
        "loc": item["locality_prompt"],
        "loc_ans": item["locality_ground_truth"],
    }


def _zsre_key(raw: Item) -> Any:
    """What ZsreDataset keeps of a record of the file."""
    answers = raw.get("answers")
    first = answers[0] if isinstance(answers, Sequence) and answers else None
    return [raw.get("src"), raw.get("alt"), first, raw.get("rephrase"), raw.get("loc"), raw.get("loc_ans")]


def _knowedit_key(raw: Item) -> Any:
    """What KnowEditDataset keeps of a record of the file."""
    groups = [_part(raw, part).get(group) for part, group in KNOWEDIT_FIELDS.values()]
    named = [raw.get(a, raw.get(b)) for a, b in (("subject", "concept"), ("prompt", "text"), ("target_new", "labels"))]
    return [*named, raw.get("ground_truth"), *groups]


def _part(raw: Item, name: str) -> Item:
    found = raw.get(name)
    return found if isinstance(found, Mapping) else {}


def _read_back(
    items: Sequence[Item],
    path: str | Path,
    where: str,
    key: Callable[[Item], Any],
    omits_blank_targets: bool,
    protocol: str | None = None,
) -> RecordSet:
    """Records of the file that the items came from, at their positions in the file.

    Records that the dataset omitted itself are listed as skipped too, up to the last item, or to the end of the file
    where the dataset goes through all of it.
    """
    file = read_json(path)
    if not isinstance(file, Sequence) or isinstance(file, str):
        raise DataError(f"{path} must hold a list of records; found {type(file).__name__}.")
    positions = _positions(items, file, str(path), where, key)
    omitted = [
        i for i, raw in enumerate(file) if omits_blank_targets and isinstance(raw, Mapping) and raw.get("alt") == ""
    ]
    if len(items) + len(omitted) < len(file):
        omitted = [i for i in omitted if i < max(positions)]
    order = sorted(positions + omitted) if positions == sorted(positions) else positions + omitted
    found = parse_records([file[i] for i in order], str(path), protocol)
    return RecordSet(
        found.records,
        found.protocol,
        tuple((order[i], reason) for i, reason in found.skipped),
        tuple((order[i], reason) for i, reason in found.dropped),
    )


def _positions(
    items: Sequence[Item], file: Sequence[Any], path: str, where: str, key: Callable[[Item], Any]
) -> list[int]:
    """Position in the file of each item: its "case_id" where the contents agree there, else where they do agree.

    Raises:
        DataError: an item that is not in the file, or that several records could be that differ in what was dropped.
    """
    free: dict[str, list[int]] = defaultdict(list)
    for position, raw in enumerate(file):
        if isinstance(raw, Mapping):
            free[_as_text(key(raw))].append(position)
    out: list[int] = []
    for number, item in enumerate(items):
        candidates, named = free[_as_text(key(item))], item["case_id"]
        called = f"Record {number} of {where}, {item.get('src', item.get('prompt'))!r},"
        if not candidates:
            raise DataError(
                f"{called} is not in {path}, or occurs there less often. Pass the file that the dataset was made from."
            )
        dropped = {_as_text([file[i].get(name) for name in DROPPED_FIELDS]) for i in candidates}
        if named not in candidates and len(dropped) > 1:
            raise DataError(
                f"{called} could be any of the records {', '.join(map(str, candidates))} of {path}, which differ in "
                f"{', '.join(DROPPED_FIELDS)}. Remove all but the right one from the file."
            )
        position = named if named in candidates else candidates[0]
        candidates.remove(position)
        out.append(position)
    return out


def _as_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=repr)
