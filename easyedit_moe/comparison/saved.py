"""Rows that are kept on disk as they are done, and read again by a comparison that goes on after an interruption."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from easyedit_moe.comparison.compare import Comparison
from easyedit_moe.comparison.ready import READY
from easyedit_moe.comparison.retention import Retention
from easyedit_moe.comparison.rows import PRE_EDIT, SCORES, Row
from easyedit_moe.errors import DataError
from easyedit_moe.evaluation.metrics import EvaluationResult
from easyedit_moe.evaluation.summary import Score
from easyedit_moe.storage.schema import content_of, read_record, read_value
from easyedit_moe.storage.strict_json import finite, json_text, read_checked_json, write_checked_json

RESULTS = "results.json"
_ADVICE = "it is no result of compare; choose another --out, or leave --resume out to write it anew"


def save_rows(comparison: Comparison, folder: Path) -> Path:
    """Write ``results.json``, in full or not at all; its ``state`` says whether all rows are there."""
    return write_checked_json(folder / RESULTS, comparison.to_dict())


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
    """What a ``results.json`` holds, of schema 1 or 2.

    Raises:
        DataError: it can't be read, is not what was written, or is something else.
    """
    content = read_checked_json(path, DataError, _ADVICE)
    with content_of(path, DataError, _ADVICE):
        saved = read_record(content, _Saved)
        protocol = read_value(saved.provenance.get("protocol"), str, "its provenance.protocol")
        rows = tuple(_row(row, protocol) for row in saved.rows)
    return Comparison(rows, saved.provenance, complete=saved.state == "complete")


def row_of(values: Mapping[str, Any], protocol: str) -> Row:
    """The row that ``Row.to_dict`` made ``values`` of, read back from JSON of schema 1 or 2.

    Raises:
        ValueError: values that a row has not, or lacks.
    """
    return _row(read_record(finite(values), _SavedRow, "a row"), protocol)


@dataclass(frozen=True)
class _SavedScore:
    """Of either schema: in the first there were neither intervals nor values."""

    mean: float | None
    stderr: float | None
    count: int
    low: float | None = None
    high: float | None = None
    interval: str = ""
    values: tuple[float | None, ...] = ()

    def score(self) -> Score:
        mean, stderr = (math.nan if value is None else value for value in (self.mean, self.stderr))
        return Score(mean, stderr, self.count, self.low, self.high, self.interval, self.values)


@dataclass(frozen=True)
class _SavedScores:
    """The scores of a moment on the way; ``edits`` so far, but for those of each record's own batch."""

    efficacy: _SavedScore
    generalisation: _SavedScore
    specificity: _SavedScore
    utility: _SavedScore
    exact_match: _SavedScore
    edits: int = 0

    def result(self, protocol: str) -> EvaluationResult:
        return EvaluationResult(protocol, **{name: getattr(self, name).score() for name in SCORES})


@dataclass(frozen=True)
class _SavedRetention:
    own: _SavedScores
    batches: list[_SavedScores]

    def retention(self, protocol: str) -> Retention:
        after = tuple((one.edits, one.result(protocol)) for one in self.batches)
        return Retention(self.own.result(protocol), after)


@dataclass(frozen=True)
class _SavedRow:
    """As `Row.to_dict` has it, with what `Comparison.to_dict` adds."""

    method: str
    edits: str
    code: str
    efficacy: _SavedScore
    generalisation: _SavedScore
    specificity: _SavedScore
    utility: _SavedScore
    exact_match: _SavedScore
    routing_similarity: dict[str, dict[str, Any]]
    seconds: dict[str, float]
    peak_memory_bytes: int
    targets_reached: int | None
    rounding_loss: float | None
    easyedit: dict[str, _SavedScore] | None
    hparams: dict[str, Any]
    warnings: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    per_seed: tuple[dict[str, float | None], ...] = ()
    protocol: str = ""
    differs_from_best: dict[str, dict[str, Any]] = field(default_factory=dict)
    retention: _SavedRetention | None = None
    answers: dict[str, _SavedScore] | None = None


@dataclass(frozen=True)
class _Saved:
    """Content of ``results.json``; the first files had no state, and were written once all rows were there."""

    schema: Literal[1, 2]
    rows: list[_SavedRow]
    provenance: dict[str, Any]
    state: Literal["complete", "interrupted"] = "complete"


def _row(saved: _SavedRow, protocol: str) -> Row:
    own = {item.name for item in fields(Row)} - {"easyedit", "retention", "answers"}
    return Row(
        **{name: value for name, value in vars(saved).items() if name in own},
        scores=EvaluationResult(protocol, **{name: getattr(saved, name).score() for name in SCORES}),
        routing={name: _routing(name, found) for name, found in saved.routing_similarity.items()},
        easyedit=_scores(saved.easyedit),
        retention=None if saved.retention is None else saved.retention.retention(protocol),
        answers=_scores(saved.answers),
    )


def _scores(saved: dict[str, _SavedScore] | None) -> dict[str, Score] | None:
    return None if saved is None else {name: found.score() for name, found in saved.items()}


def _routing(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    where = f"routing_similarity.{name}"
    mean = read_value(values.get("mean"), float | None, f"{where}.mean")
    per_layer = read_value(values.get("per_layer"), dict[int, float | None], f"{where}.per_layer")
    return {**values, "mean": mean, "per_layer": per_layer}
