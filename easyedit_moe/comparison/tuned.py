"""Which records settings were chosen on: kept beside the settings, so that no score is reported on them by mistake."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from easyedit_moe.errors import DataError
from easyedit_moe.facts.records import EvaluationRecord
from easyedit_moe.hparams.models import LOCATED
from easyedit_moe.storage.schema import content_of, read_value
from easyedit_moe.storage.strict_json import digest, read_checked_json

TUNING = "tuning.json"
"""File beside tuned settings: the records that were used, and all trials."""


def rows_file(out: str | Path) -> Path:
    """Where ``init --locate`` writes what it measured: ``my.locate.json`` beside ``my.yaml``, as a results.json."""
    path = Path(out)
    stem = path.stem if path.suffix in (".yaml", ".yml") else path.name
    return path.with_name(f"{stem}{LOCATED}")


def record_hash(record: EvaluationRecord) -> str:
    """Of what is edited: prompt and new target."""
    return digest([record.request.prompt, record.request.target_new])[:16]


def check_held_out(
    hparams: str | Path | None, records: Sequence[EvaluationRecord], files: Sequence[Path] | None = None
) -> None:
    """Refuse to score settings on records that they were tuned on, or that their layers were located on.

    Args:
        hparams: a YAML file, or a folder of them, in which `TUNING` may lie; None: settings that ship.
        records: that are to be edited and judged.
        files: the YAML files that are used, beside each of which its `rows_file` may lie; by default ``hparams``.

    Raises:
        DataError: some of the records were used to choose the settings, or the file that says so can't be read.
    """
    if hparams is None:
        return
    given = Path(hparams)
    used = [given] if files is None and not os.path.isdir(given) else list(files or [])
    folders = dict.fromkeys([given if os.path.isdir(given) else given.parent, *(file.parent for file in used)])
    for folder in folders:
        _check(folder / TUNING, records, f"tune {hparams}", "tuning", "tune")
    for file in used:
        _check(rows_file(file), records, f"locate the layers of {file}", "locating", "init --locate")


def _check(path: Path, records: Sequence[EvaluationRecord], purpose: str, doing: str, command: str) -> None:
    """DataError where a file, if it is there, names one of the records."""
    if not os.path.isfile(path):
        return
    advice = f"delete it, or run {command} again"
    saved = read_checked_json(path, DataError, advice)
    with content_of(path, DataError, f"it does not say which records were used for {doing}; {advice}"):
        used = set(read_value(saved.get("records"), list[str], "records"))
    seen = [record for record in records if record_hash(record) in used]
    if seen:
        raise DataError(
            f"{len(seen)} of the {len(records)} records were used to {purpose} (so says {path}), the first: "
            f"{seen[0].request.prompt!r}. Scores on them would flatter; choose others, by --skip or --data."
        )
