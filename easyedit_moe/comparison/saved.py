"""Rows that are kept on disk as they are done, and read again by a comparison that goes on after an interruption."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from easyedit_moe.comparison.compare import Comparison
from easyedit_moe.comparison.ready import READY
from easyedit_moe.comparison.rows import PRE_EDIT, SCORES, Row
from easyedit_moe.errors import DataError
from easyedit_moe.evaluation.metrics import EvaluationResult
from easyedit_moe.evaluation.summary import Score
from easyedit_moe.storage.strict_json import json_text, read_json, write_json

RESULTS = "results.json"


def save_rows(comparison: Comparison, folder: Path) -> Path:
    """Write ``results.json``, in full or not at all; its ``state`` says whether all rows are there."""
    return write_json(folder / RESULTS, comparison.to_dict())


def earlier_rows(folder: Path, provenance: Mapping[str, Any], wanted: Sequence[str]) -> list[Row]:
    """Rows of the ``results.json`` in a folder, for a comparison of the same model, data and settings; none without it.

    Args:
        folder: where the earlier run wrote to.
        provenance: of the task that goes on.
        wanted: names of the rows that will be made.

    Raises:
        DataError: a file that can't be read, was made of something else, or holds rows that would be lost.
    """
    path = folder / RESULTS
    if not path.is_file():
        return []
    saved = read_results(path)
    found, read = saved.provenance, list(saved.rows)
    differing = [
        f"{name}: {found.get(name)!r} there, {value!r} now"
        for name, value in {READY: None, **provenance}.items()
        if json_text(found.get(name)) != json_text(value)
    ]
    if differing:
        raise DataError(
            f"{path} can't be gone on with: it was made of something else ({'; '.join(differing)}). Repeat its "
            "settings, choose another --out, or leave --resume out to write it anew."
        )
    lost = [row.method for row in read if row.method not in (PRE_EDIT, *wanted)]
    if lost:
        raise DataError(
            f"{path} has rows that are not asked for and would be lost: {', '.join(lost)}. Add them to --methods, or "
            "choose another --out."
        )
    return read


def read_results(path: Path) -> Comparison:
    """What a ``results.json`` holds.

    Raises:
        DataError: it can't be read, or is something else.
    """
    saved = read_json(path)
    try:
        about = saved["provenance"]
        rows = tuple(row_of(values, about["protocol"]) for values in saved["rows"])
        return Comparison(rows, about, complete=saved["state"] == "complete")
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no result of compare ({error!r}); choose another --out.") from error


def row_of(values: Mapping[str, Any], protocol: str) -> Row:
    """The row that ``Row.to_dict`` made ``values`` of, read back from JSON of schema 1 or 2."""
    own = {item.name for item in fields(Row)}
    read: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in own}
    read["scores"] = EvaluationResult(protocol, **{name: _score(values[name]) for name in SCORES})
    read["routing"] = {name: _routing(found) for name, found in values["routing_similarity"].items()}
    if values["easyedit"] is not None:
        read["easyedit"] = {name: _score(found) for name, found in values["easyedit"].items()}
    return Row(**read)


def _score(values: Mapping[str, Any]) -> Score:
    """Of either schema: in the first there were neither intervals nor values."""
    mean, stderr = (math.nan if values[name] is None else values[name] for name in ("mean", "stderr"))
    interval = (values.get("low"), values.get("high"), values.get("interval", ""))
    return Score(mean, stderr, values["count"], *interval, tuple(values.get("values", ())))


def _routing(values: Mapping[str, Any]) -> dict[str, Any]:
    return {**values, "per_layer": {int(layer): value for layer, value in values["per_layer"].items()}}
