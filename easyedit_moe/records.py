"""Evaluation records: CounterFact and ZsRE files in their public layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyedit_moe import factworld
from easyedit_moe.errors import DataError, RequestError
from easyedit_moe.requests import EditRequest, parse_request

PROTOCOLS = ("counterfact", "zsre")


@dataclass(frozen=True)
class EvaluationRecord:
    """One edit and the prompts by which it is judged.

    Attributes:
        request: the edit.
        paraphrases: prompts that ask the same.
        neighbours: prompts that must keep their answer, with that answer.
    """

    request: EditRequest
    paraphrases: tuple[str, ...]
    neighbours: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class RecordSet:
    """Usable records of a file, the protocol its layout calls for, and (position, reason) of each skipped one."""

    records: tuple[EvaluationRecord, ...]
    protocol: str
    skipped: tuple[tuple[int, str], ...]


def load_records(source: str | Path) -> RecordSet:
    """Read "factworld", "factworld-easyedit" or a JSON file of records.

    Known layouts: ROME's counterfact.json and multi_counterfact.json (``requested_rewrite``, ``paraphrase_prompts``,
    ``neighborhood_prompts``); EasyEdit's CounterFact (``prompt``, ``subject``, ``target_new``, ``ground_truth``,
    ``rephrase_prompt``, ``locality_prompt``, ``locality_ground_truth``); ZsRE (``src``, ``subject``, ``alt``,
    ``answers``, ``rephrase``, ``loc``, ``loc_ans``). A record that can't be used is skipped and listed with the reason.

    Raises:
        DataError: missing file, not JSON, not a list of records, an unknown layout, or not one usable record.
    """
    bundled = {factworld.MODEL_NAME: "counterfact.json", f"{factworld.MODEL_NAME}-easyedit": "easyedit.json"}
    path = factworld.data_path(bundled[str(source)]) if str(source) in bundled else Path(source)
    if not path.is_file():
        raise DataError(f"The data file {path} does not exist. Bundled data: {', '.join(bundled)}.")
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    return parse_records(items, str(path))


def parse_records(items: Sequence[Mapping[str, Any]], where: str = "the data") -> RecordSet:
    """Records of one layout, recognised by the first item; see :func:`load_records`."""
    if not isinstance(items, Sequence) or not items or not all(isinstance(item, Mapping) for item in items):
        raise DataError(f"{where} must hold a non-empty list of records; found {type(items).__name__}.")
    first = items[0]
    if "requested_rewrite" in first:
        protocol, parse = "counterfact", _rome_counterfact
    elif "src" in first and "alt" in first:
        protocol, parse = "zsre", _zsre
    elif "prompt" in first and "target_new" in first:
        protocol, parse = "counterfact", _easyedit_counterfact
    else:
        raise DataError(
            f"{where}: unknown layout with the keys {', '.join(sorted(first))}. Expected CounterFact "
            "(requested_rewrite), EasyEdit's CounterFact (prompt, subject, target_new) or ZsRE (src, subject, alt)."
        )
    records, skipped = [], []
    for number, item in enumerate(items):
        try:
            records.append(parse(item))
        except (RequestError, KeyError) as error:
            skipped.append((number, f"missing {error}" if isinstance(error, KeyError) else str(error)))
    if not records:
        raise DataError(f"{where}: none of {len(items)} records can be used; the first: {skipped[0][1]}")
    return RecordSet(tuple(records), protocol, tuple(skipped))


def _rome_counterfact(item: Mapping[str, Any]) -> EvaluationRecord:
    request = parse_request(item)
    if request.ground_truth is None:
        raise RequestError("'target_true' is missing.")
    neighbours = tuple((prompt, request.ground_truth) for prompt in _texts(item["neighborhood_prompts"]))
    return EvaluationRecord(request, _texts(item["paraphrase_prompts"]), neighbours)


def _easyedit_counterfact(item: Mapping[str, Any]) -> EvaluationRecord:
    request = parse_request(item)
    if request.ground_truth is None:
        raise RequestError("'ground_truth' is missing.")
    prompts, answers = _texts(item.get("locality_prompt")), _texts(item.get("locality_ground_truth"))
    if len(prompts) != len(answers):
        raise RequestError(f"{len(prompts)} locality prompts, but {len(answers)} answers.")
    return EvaluationRecord(request, _texts(item.get("rephrase_prompt")), tuple(zip(prompts, answers, strict=True)))


def _zsre(item: Mapping[str, Any]) -> EvaluationRecord:
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
    (loc,), (loc_ans,) = _texts([item["loc"]]), _texts([item["loc_ans"]])
    return EvaluationRecord(request, _texts([item["rephrase"]]), ((loc, loc_ans),))


def _texts(value: Any) -> tuple[str, ...]:
    """Nothing, one text or a list of texts as a tuple."""
    listed = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(listed, Sequence) or not all(isinstance(text, str) for text in listed):
        raise RequestError(f"Prompts and answers must be strings; found {value!r}.")
    return tuple(listed)
