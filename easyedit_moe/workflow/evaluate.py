"""``evaluate``: what a model knows and can do, before and after a patch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.adapters.moe_adapter import base_fingerprint
from easyedit_moe.errors import DataError, DenseModelError
from easyedit_moe.evaluation import harness, metrics
from easyedit_moe.evaluation.neighbours import answered
from easyedit_moe.evaluation.paired import PairedTest, paired_test
from easyedit_moe.evaluation.portability import portability
from easyedit_moe.evaluation.summary import Score, Summary
from easyedit_moe.facts.records import PROTOCOLS, RecordSet, load_records
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches.checks import versions
from easyedit_moe.statistics.corpus import corpus_hash
from easyedit_moe.workflow.session import (
    Loaded,
    Loading,
    SavedPatch,
    applied,
    asked_in_chat,
    check_patches,
    load,
    loading_options,
    model_name,
    read_patches,
)

logger = logging.getLogger(__name__)

Scores = dict[tuple[str, str], Summary]
RECORDS = "records"
PORTABILITY = "portability"
HARNESS = "lm-evaluation-harness"
SCORES = {
    "efficacy": "efficacy",
    "generalisation": "generalisation",
    "specificity": "specificity",
    "utility": "utility",
    "exact_match": "exact match",
}


@dataclass(frozen=True)
class Measure:
    """One line of the table.

    Attributes:
        group: "records", or the name of a task.
        name: of the score: of records in percent, of tasks as lm-evaluation-harness reports it.
        before: of the model as it was loaded.
        after: with the patches; None without any.
        change: paired test of after against before, record by record; None for tasks, and without a patch.
        protocol: of `easyedit_moe.facts.records.PROTOCOLS`, or "lm-evaluation-harness".
    """

    group: str
    name: str
    before: Summary
    after: Summary | None
    protocol: str
    change: PairedTest | None = None


@dataclass(frozen=True)
class Evaluation:
    """All lines of the table, and what is needed to make them again."""

    measures: tuple[Measure, ...]
    provenance: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Content of results.json (schema 2); what is no number is null."""
        listed = [_finite(asdict(measure)) for measure in self.measures]
        return {"schema": 2, "measures": listed, "provenance": self.provenance}


def evaluate(
    model: str | Loaded = "factworld",
    patches: Sequence[str | Path | SavedPatch] = (),
    data: str | Path | None = None,
    tasks: Sequence[str] = (),
    tasks_dir: str | Path | None = None,
    limit: int | None = None,
    loading: Loading | None = None,
    progress: bool = True,
    chat: bool | None = None,
    protocol: str | None = None,
) -> Evaluation:
    """Scores of records and of tasks, before and after patches; the model is then bit-equal to before.

    Records are scored by their own protocol (see `easyedit_moe.evaluation.metrics.evaluate`) and by portability, tasks
    by lm-evaluation-harness.

    Args:
        model: hub name, folder or "factworld", or a loaded model and its tokenizer.
        patches: files, or patches that are not applied; applied in this order.
        data: file of records, as `easyedit_moe.facts.records.load_records` reads it.
        tasks: names of tasks; they need the extra ``eval``.
        tasks_dir: folder of tasks of one's own.
        limit: examples per task; all by default.
        loading: how a model is loaded; see `easyedit_moe.workflow.session.loading_options`.
        progress: show progress bars.
        chat: every prompt of the records is the user's turn in the tokenizer's template, and so are the tasks' prompts;
            by default where the patches were made so.
        protocol: how the records are read and judged, as in `easyedit_moe.facts.records.load_records`.

    Raises:
        DataError: nothing to measure, or data, a task or a model that can't be used. PatchError: a file that is no
            patch, or a patch that does not fit the model. DependencyError: tasks, without lm-evaluation-harness.
    """
    if data is None and not tasks:
        raise DataError("There is nothing to measure: give a file of records, tasks, or both.")
    found = load_records(data, protocol) if data is not None else None
    loaded = read_patches(patches)
    in_chat = asked_in_chat(loaded, chat)
    runner = harness.Harness(tasks, tasks_dir, limit, progress=progress, chat=in_chat) if tasks else None
    options = loading_options(model, loaded, loading) if isinstance(model, str) else Loading()
    net, tok = load(model, options, progress)
    check_patches(net, tok, loaded)  # one that does not fit is refused before anything is measured
    provenance = {
        "model": model_name(model),
        "model_fingerprint": _fingerprint(net),
        "patches": [str(p) if isinstance(p, (str, Path)) else type(p).__name__ for p in patches],
        "patch_ids": [patch.id for patch in loaded],
        **_about_records(data, found),
        **_about_tasks(tasks, tasks_dir, limit),
        **({"chat": True} if in_chat else {}),
        **(asdict(options) if isinstance(model, str) else {}),
        "versions": versions() | ({"lm_eval": harness.version()} if tasks else {}),
    }
    return Evaluation(_measures(net, tok, found, runner, loaded, in_chat), provenance)


def _measures(
    net: nn.Module,
    tok: PreTrainedTokenizerBase,
    found: RecordSet | None,
    runner: harness.Harness | None,
    patches: Sequence[SavedPatch],
    chat: bool,
) -> tuple[Measure, ...]:
    records = answered(net, tok, found.records, chat) if found is not None else ()

    def scores() -> Scores:
        out = _record_scores(net, tok, records, found.protocol, chat) if found is not None else {}
        return out | (_task_scores(runner, net, tok) if runner is not None else {})

    def protocol(group: str, name: str) -> str:
        if group != RECORDS or found is None:
            return HARNESS
        return "token_accuracy" if name == PORTABILITY else found.protocol

    before = scores()
    if not patches:
        return tuple(Measure(*name, _summary(score), None, protocol(*name)) for name, score in before.items())
    with applied(net, tok, patches):
        after = scores()
    return tuple(
        Measure(*name, _summary(score), _summary(after[name]), protocol(*name), _change(score, after[name]))
        for name, score in before.items()
    )


def _summary(score: Summary) -> Summary:
    """Without the values of single records."""
    return Summary(score.mean, score.stderr, score.count, score.low, score.high, score.interval)


def _change(before: Summary, after: Summary) -> PairedTest | None:
    if isinstance(before, Score) and isinstance(after, Score):
        return paired_test(after.values, before.values)
    return None


def _fingerprint(net: nn.Module) -> str:
    """Of a MoE model; of a dense one, which only an adapter edits, the adapter's."""
    try:
        return model_fingerprint(MoELayerView(net))
    except DenseModelError:
        return base_fingerprint(net)


def _record_scores(
    net: nn.Module, tok: PreTrainedTokenizerBase, records: Sequence[Any], protocol: str, chat: bool
) -> Scores:
    result = metrics.evaluate(net, tok, records, protocol, chat=chat)
    found = {shown: getattr(result, name) for name, shown in SCORES.items()}
    found[PORTABILITY] = portability(net, tok, records, chat=chat)
    return {(RECORDS, name): score for name, score in found.items() if score.count}


def _task_scores(runner: harness.Harness, net: nn.Module, tok: PreTrainedTokenizerBase) -> Scores:
    return {
        (task, metric): Summary(score.value, score.stderr, score.count)
        for task, found in runner.scores(net, tok).items()
        for metric, score in found.items()
    }


def _about_records(data: str | Path | None, found: RecordSet | None) -> dict[str, Any]:
    if found is None:
        return {}
    for number, reason in found.skipped[:1]:
        logger.warning(
            "%d records of %s are unusable; the first, %s %d: %s", len(found.skipped), data, found.unit, number, reason
        )
    return {
        "data": str(data),
        "data_hash": corpus_hash([repr(record) for record in found.records]),
        "records": len(found.records),
        "skipped_records": len(found.skipped),
        "protocol": found.protocol,
        "protocols": {RECORDS: f"{PROTOCOLS[found.protocol]}, percent; portability: {PROTOCOLS['token_accuracy']}"},
    }


def _about_tasks(tasks: Sequence[str], tasks_dir: str | Path | None, limit: int | None) -> dict[str, Any]:
    where = None if tasks_dir is None else str(tasks_dir)
    return {"tasks": list(tasks), "tasks_dir": where, "limit": limit} if tasks else {}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not isfinite(value) else value
