"""What a comparison runs on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import DataError
from easyedit_moe.evaluation.neighbours import answered
from easyedit_moe.evaluation.real_answers import RealAnswers
from easyedit_moe.facts.records import EvaluationRecord, RecordSet, load_records
from easyedit_moe.moe.fingerprint import unedited_fingerprint
from easyedit_moe.moe.loading import load_model
from easyedit_moe.patches.checks import versions
from easyedit_moe.progress import library_bars
from easyedit_moe.statistics.corpus import corpus_hash

logger = logging.getLogger(__name__)

PRESERVED = 1000
"""Other edits whose routing is watched. Papers: 1000."""


@dataclass(frozen=True)
class Task:
    """What a comparison runs on: a loaded model and the records to edit and judge, in a chat or as plain text.

    ``preserved`` are prompts whose routing should stay as it is; without any, the records' neighbours are taken. With
    ``retention`` methods are scored on the way, too, and with ``answers`` by their real answers: see `asking`.
    """

    model: nn.Module
    tok: PreTrainedTokenizerBase
    records: tuple[EvaluationRecord, ...]
    protocol: str
    batch_size: int
    provenance: dict[str, Any]
    chat: bool = False
    preserved: tuple[str, ...] = ()
    retention: bool = False
    answers: RealAnswers | None = None

    def asking(self, retention: bool = False, answers: RealAnswers | None = None) -> Task:
        """The same task, judged by more: scores right after each own batch and after every batch, and real answers."""
        asked: dict[str, Any] = {"retention": True} if retention else {}
        asked |= {"answers": answers.to_dict()} if answers else {}
        return replace(self, retention=retention, answers=answers, provenance={**self.provenance, **asked})


def load_task(
    model_name: str, data: str, edits: int, skip: int, batch_size: int, dtype: str, device: int | str,
    model_parallel: bool = False, trust_remote_code: bool = False, progress: bool = True, chat: bool = False,
    protocol: str | None = None,
) -> Task:  # fmt: skip
    """Load model and records; record ``skip`` is the first to be edited, ``protocol`` that of `load_records`.

    Raises:
        DataError: unusable data or model, or fewer records than asked for. HyperParamsError: bad dtype or device.
    """
    found, records = _chosen(data, edits, skip, batch_size, protocol)
    preserved = _preserved(found, records)
    with library_bars(progress):
        model, tok = load_model(model_name, dtype, device, model_parallel, trust_remote_code=trust_remote_code)
    provenance = {
        "model": model_name,
        "model_fingerprint": unedited_fingerprint(model),
        **_about(data, found, records, skip, preserved),
        "batch_size": batch_size,
        **({"chat": True} if chat else {}),
        "dtype": dtype,
        "device": str(device),
        "versions": versions(),
    }
    judged = answered(model, tok, records, chat)
    return Task(model, tok, judged, found.protocol, batch_size, provenance, chat, preserved)


def with_data(task: Task, data: str, edits: int, skip: int = 0) -> Task:
    """The same model on other records.

    Raises:
        DataError: unusable data, or fewer records than asked for.
    """
    found, records = _chosen(data, edits, skip, task.batch_size)
    preserved = _preserved(found, records)
    provenance = {**task.provenance, **_about(data, found, records, skip, preserved)}
    judged = answered(task.model, task.tok, records, task.chat)
    return replace(task, records=judged, protocol=found.protocol, provenance=provenance, preserved=preserved)


def _chosen(
    data: str, edits: int, skip: int, batch_size: int, protocol: str | None = None
) -> tuple[RecordSet, tuple[EvaluationRecord, ...]]:
    """All that was read, and the records to edit; what is unusable is told."""
    found = load_records(data, protocol)
    if edits < 1 or skip < 0 or batch_size < 1:
        raise DataError(f"edits and batch-size must be >= 1 and skip >= 0; found {edits}, {batch_size}, {skip}.")
    records = found.records[skip : skip + edits]
    if len(records) < edits:
        raise DataError(f"{data} has {len(found.records)} usable records; {skip} + {edits} were asked for.")
    for what, left_out in (("records", found.skipped), ("prompts of usable records", found.dropped)):
        if left_out:
            number, reason = left_out[0]
            first = f"{found.unit} {number}: {reason}"
            logger.warning("%d %s of %s are unusable; the first, %s", len(left_out), what, data, first)
    return found, records


def _preserved(found: RecordSet, records: Sequence[EvaluationRecord]) -> tuple[str, ...]:
    """Prompts of the first other edits of the file, as the papers' preservation set has them."""
    edited = {record.request.prompt for record in records}
    others = dict.fromkeys(record.request.prompt for record in found.records if record.request.prompt not in edited)
    return tuple(others)[:PRESERVED]


def _about(
    data: str, found: RecordSet, records: Sequence[EvaluationRecord], skip: int, preserved: Sequence[str]
) -> dict[str, Any]:
    return {
        "data": data,
        "data_hash": corpus_hash([repr(record) for record in records]),
        "protocol": found.protocol,
        "edits": len(records),
        "skip": skip,
        "skipped_records": len(found.skipped),
        "preserved_prompts": len(preserved),
    }
