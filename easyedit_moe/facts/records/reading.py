"""Files of records, their layout recognised by their keys."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from easyedit_moe import factworld
from easyedit_moe.errors import DataError, RequestError
from easyedit_moe.facts.records.counterfact import parse_easyedit_counterfact, parse_rome_counterfact
from easyedit_moe.facts.records.knowedit import is_sanitation, parse_knowedit, parse_sanitation, sanitation_items
from easyedit_moe.facts.records.record import Parsed, RecordSet
from easyedit_moe.facts.records.wikibigedit import parse_wikibigedit
from easyedit_moe.facts.records.zsre import parse_zsre

Layout = tuple[str, Callable[[Mapping[str, Any]], Parsed]]


def load_records(source: str | Path) -> RecordSet:
    """Read "factworld", "factworld-easyedit" or a JSON file of records.

    Known layouts, with the keys they need (the module of each says which more it reads):

    - ROME's counterfact.json and multi_counterfact.json: ``requested_rewrite``, ``paraphrase_prompts``,
      ``neighborhood_prompts``;
    - EasyEdit's CounterFact: ``prompt``, ``subject``, ``target_new``, ``ground_truth``;
    - ZsRE: ``src``, ``subject``, ``alt``, ``answers``, ``rephrase``, ``loc``, ``loc_ans``;
    - KnowEdit: ``prompt``, ``subject``, ``target_new``, ``locality`` by group (WikiData_counterfact, WikiData_recent,
      ZsRE) or ``text``, ``concept``, ``labels`` (WikiBio); Sanitation with a ``subject`` to each question;
    - WikiBigEdit: ``update``, ``subject``, ``ans``.

    A record that can't be used is skipped and listed with the reason.

    Raises:
        DataError: missing file, not JSON, not a list of records, an unknown layout, or not one usable record.
    """
    bundled = {factworld.MODEL_NAME: "counterfact.json", f"{factworld.MODEL_NAME}-easyedit": "easyedit.json"}
    path = factworld.data_path(bundled[str(source)]) if str(source) in bundled else Path(source)
    if not path.is_file():
        raise DataError(f"The data file {path} does not exist. Bundled data: {', '.join(bundled)}.")
    return parse_records(read_json(path), str(path))


def read_json(path: str | Path) -> Any:
    """Content of a JSON file.

    Raises:
        DataError: missing file, or not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"The data file {path} does not exist.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error


def parse_records(items: Sequence[Mapping[str, Any]] | Mapping[str, Any], where: str = "the data") -> RecordSet:
    """Records of one layout, recognised by the first item that has one; see `load_records`."""
    if is_sanitation(items):
        return _parse_all(sanitation_items(items, where), ("token_accuracy", parse_sanitation), where)
    listed = items if isinstance(items, Sequence) and not isinstance(items, str) else ()
    if not any(isinstance(item, Mapping) for item in listed):
        raise DataError(f"{where} must hold a non-empty list of records; found {type(items).__name__}.")
    layout = next((found for item in listed if isinstance(item, Mapping) and (found := _layout_of(item))), None)
    if layout is None:
        raise DataError(_unknown(next(item for item in listed if isinstance(item, Mapping)), where))
    return _parse_all(listed, layout, where)


def _layout_of(item: Mapping[str, Any]) -> Layout | None:
    if "requested_rewrite" in item:
        return "counterfact", parse_rome_counterfact
    if "src" in item and "alt" in item:
        return "zsre", parse_zsre
    if "update" in item and "ans" in item:
        return "token_accuracy", parse_wikibigedit
    if isinstance(item.get("locality"), Mapping) or {"text", "concept", "labels"} <= item.keys():
        return "token_accuracy", parse_knowedit
    if "prompt" in item and "target_new" in item:
        return "counterfact", parse_easyedit_counterfact
    return None


def _unknown(item: Mapping[str, Any], where: str) -> str:
    if {"ent", "pos", "neg"} <= item.keys():
        return (
            f"{where} is a ConvSent file: topics with positive and negative opinions. It has neither prompts nor "
            "targets and is judged by a sentiment classifier, so it can't be read as edits of facts."
        )
    return (
        f"{where}: unknown layout with the keys {', '.join(sorted(item))}. Expected CounterFact (requested_rewrite), "
        "EasyEdit's CounterFact (prompt, subject, target_new), ZsRE (src, subject, alt), KnowEdit (prompt, subject, "
        "target_new, locality; or text, concept, labels) or WikiBigEdit (update, subject, ans)."
    )


def _parse_all(items: Sequence[Any], layout: Layout, where: str) -> RecordSet:
    protocol, parse = layout
    records, skipped, dropped = [], [], []
    for number, item in enumerate(items):
        try:
            if not isinstance(item, Mapping):
                raise RequestError(f"A record must be a dict; found {type(item).__name__}.")
            record, reasons = parse(item)
        except (RequestError, KeyError) as error:
            skipped.append((number, f"missing {error}" if isinstance(error, KeyError) else str(error)))
            continue
        records.append(record)
        dropped += [(number, reason) for reason in reasons]
    if not records:
        first = f"; the first: {skipped[0][1]}" if skipped else ""
        raise DataError(f"{where}: none of {len(items)} records can be used{first}")
    return RecordSet(tuple(records), protocol, tuple(skipped), tuple(dropped))
