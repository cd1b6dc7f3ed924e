"""Which records settings were tuned on: kept beside the settings, so that no score is reported on them by mistake."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from easyedit_moe.errors import DataError
from easyedit_moe.facts.records import EvaluationRecord
from easyedit_moe.storage.schema import content_of, read_value
from easyedit_moe.storage.strict_json import digest, read_checked_json

_ADVICE = "delete it, or run tune again"
TUNING = "tuning.json"
"""File beside the tuned settings: the records that were used, and all trials."""


def record_hash(record: EvaluationRecord) -> str:
    """Of what is edited: prompt and new target."""
    return digest([record.request.prompt, record.request.target_new])[:16]


def check_held_out(hparams: str | Path | None, records: Sequence[EvaluationRecord]) -> None:
    """Refuse to score settings on records that they were tuned on.

    Args:
        hparams: a YAML file, or a folder of them, in which `TUNING` may lie.
        records: that are to be edited and judged.

    Raises:
        DataError: some of the records were used for tuning, or the file that says so can't be read.
    """
    if hparams is None:
        return
    path = (Path(hparams) if os.path.isdir(hparams) else Path(hparams).parent) / TUNING
    if not os.path.isfile(path):
        return
    saved = read_checked_json(path, DataError, _ADVICE)
    with content_of(path, DataError, f"it does not say which records were used for tuning; {_ADVICE}"):
        used = read_value(saved.get("records"), list[str], "records")
    seen = [record for record in records if record_hash(record) in set(used)]
    if seen:
        raise DataError(
            f"{len(seen)} of the {len(records)} records were used to tune {hparams} (so says {path}), the first: "
            f"{seen[0].request.prompt!r}. Scores on them would flatter; choose others, by --skip or --data."
        )
