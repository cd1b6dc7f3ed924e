"""What ``locate`` has measured so far, on disk after every row, and read again by a run that goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal

from easyedit_moe.errors import DataError
from easyedit_moe.storage.schema import content_of, read_record, read_value
from easyedit_moe.storage.strict_json import finite, json_text, read_checked_json, write_checked_json
from easyedit_moe.workflow.locate_settings import STAGES

RESULTS = "results.json"
Row = dict[str, Any]


@dataclass(frozen=True)
class _Saved:
    """Content of ``results.json``."""

    schema: Literal[1]
    state: Literal["complete", "interrupted"]
    left: dict[str, int]
    seconds: dict[str, float]
    rows: dict[str, list[dict[str, Any]]]
    provenance: dict[str, Any]
    records: list[str] = field(default_factory=list)  # of init --locate, which `compare` reads


@dataclass
class Measured:
    """Rows by stage, each with its name; every change is written at once where there is a folder.

    Attributes:
        provenance: what the rows were made of.
        folder: for ``results.json``; None keeps nothing.
        rows: by stage and by the name of the layer or window.
        left: how many layers or windows are not there yet, by stage.
        seconds: that each stage took so far, loading left out.
    """

    provenance: dict[str, Any]
    folder: Path | None = None
    rows: dict[str, dict[str, Row]] = field(default_factory=lambda: {stage: {} for stage in STAGES})
    left: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> Measured:
        """What a ``results.json`` holds, without a folder.

        Raises:
            DataError: it can't be read, or is something else.
        """
        advice = "it is no result of locate; choose another --out"
        content = read_checked_json(path, DataError, advice)
        with content_of(path, DataError, advice):
            saved = read_record(content, _Saved)
            if set(saved.rows) != set(STAGES):
                raise ValueError(f"its rows are of {', '.join(saved.rows) or 'nothing'}")
            rows = {
                stage: {read_value(row.get("name"), str, f"a name of {stage}"): row for row in saved.rows[stage]}
                for stage in STAGES
            }
        return Measured(saved.provenance, None, rows, saved.left, saved.seconds)

    @staticmethod
    def resumed(folder: Path, provenance: dict[str, Any]) -> Measured:
        """With the rows of an earlier run in the folder; none where there was no such run.

        Raises:
            DataError: a file that can't be read, or that was made of another model, other facts or settings.
        """
        path = folder / RESULTS
        if not path.is_file():
            return Measured(provenance, folder)
        saved = Measured.read(path)
        differing = [
            f"{name}: {saved.provenance.get(name)!r} there, {value!r} now"
            for name, value in finite(provenance).items()
            if json_text(saved.provenance.get(name)) != json_text(value)
        ]
        if differing:
            raise DataError(
                f"{path} can't be gone on with: it was made of something else ({'; '.join(differing)}). Repeat its "
                "settings, choose another --out, or leave --resume out to write it anew."
            )
        return Measured(provenance, folder, saved.rows, saved.left, saved.seconds)

    def has(self, stage: str, name: str) -> bool:
        """Whether a row is there."""
        return name in self.rows[stage]

    def add(self, stage: str, name: str, row: Any) -> Row:
        """Keep a row: a record of values, or a dict of them."""
        values = asdict(row) if is_dataclass(row) and not isinstance(row, type) else dict(row)
        # As a run that goes on will read it: keys are texts, and what is not finite is null.
        self.rows[stage][name] = json.loads(json_text({"name": name, **values}))
        self.save()
        return self.rows[stage][name]

    @property
    def complete(self) -> bool:
        """Whether nothing is left."""
        return not any(self.left.values())

    def save(self) -> Path | None:
        """Write ``results.json``, in full or not at all."""
        return None if self.folder is None else write_checked_json(self.folder / RESULTS, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Content of ``results.json`` (schema 1)."""
        return {
            "schema": 1,
            "state": "complete" if self.complete else "interrupted",
            "left": {stage: count for stage, count in self.left.items() if count},
            "seconds": self.seconds,
            "rows": {stage: list(rows.values()) for stage, rows in self.rows.items()},
            "provenance": finite(self.provenance),
        }


def layer_rows(rows: Mapping[str, Row], layers: Sequence[int]) -> dict[int, Row]:
    """Rows of a stage that is measured layer by layer, in the order of the layers."""
    return {layer: rows[str(layer)] for layer in layers if str(layer) in rows}
