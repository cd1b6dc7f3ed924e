"""Which records settings were tuned on: kept beside the settings, so that no score is reported on them by mistake."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from easyedit_moe.errors import DataError
from easyedit_moe.facts.records import EvaluationRecord
from easyedit_moe.storage.strict_json import read_json
from easyedit_moe.storage.tensors import digest

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
    path = (Path(hparams) if Path(hparams).is_dir() else Path(hparams).parent) / TUNING
    if not path.is_file():
        return
    saved = read_json(path)
    used = saved.get("records") if isinstance(saved, dict) else None
    if not isinstance(used, list) or not all(isinstance(one, str) for one in used):
        raise DataError(f"{path} does not say which records were used for tuning; delete it, or run tune again.")
    seen = [record for record in records if record_hash(record) in set(used)]
    if seen:
        raise DataError(
            f"{len(seen)} of the {len(records)} records were used to tune {hparams} (so says {path}), the first: "
            f"{seen[0].request.prompt!r}. Scores on them would flatter; choose others, by --skip or --data."
        )
