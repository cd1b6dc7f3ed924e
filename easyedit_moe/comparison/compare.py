"""Editors side by side: each edits the same restored model in sequential batches and is judged after all edits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from easyedit_moe.comparison.differences import differences
from easyedit_moe.comparison.ready import READY, SharedTargets
from easyedit_moe.comparison.retention import RetentionWatch
from easyedit_moe.comparison.rows import PRE_EDIT, Row
from easyedit_moe.comparison.seeds import pooled, seeded
from easyedit_moe.comparison.task import Task
from easyedit_moe.editors import Editor, EditResult, make_editor
from easyedit_moe.errors import DenseModelError, EditingWarning, HyperParamsError
from easyedit_moe.evaluation.context import check_fit
from easyedit_moe.evaluation.metrics import EvaluationResult, evaluate
from easyedit_moe.evaluation.real_answers import real_answers
from easyedit_moe.evaluation.routing import RoutingSnapshot, routing_similarity, routing_snapshot
from easyedit_moe.evaluation.summary import Score
from easyedit_moe.facts.records import PROTOCOLS
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.host.baseline_hparams import PROTOCOL, BaselineHyperParams
from easyedit_moe.hparams import MoEHyperParams
from easyedit_moe.measure import Stopwatch, peak_memory_bytes, reset_peak_memory
from easyedit_moe.moe.holding import intact
from easyedit_moe.moe.layers import has_experts
from easyedit_moe.patches.applied_run import AppliedRun
from easyedit_moe.storage.strict_json import json_text


@dataclass(frozen=True)
class Comparison:
    """All rows, and everything needed to make them again."""

    rows: tuple[Row, ...]
    provenance: dict[str, Any]
    complete: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Content of results.json (schema 2); ``state`` is "complete", or "interrupted" while rows are missing."""
        state = "complete" if self.complete else "interrupted"
        rows = [
            {**row.to_dict(), "differs_from_best": {name: one.to_dict() for name, one in found.items()}}
            for row, found in zip(self.rows, differences(self.rows), strict=True)
        ]
        return {
            "schema": 2,
            "state": state,
            "rows": rows,
            "provenance": self.provenance,
        }


def compare(
    task: Task,
    hparams: Sequence[MoEHyperParams | BaselineHyperParams],
    on_row: Callable[[Row], None] | None = None,
    labels: Sequence[str] = (),
    easyedit_metrics: bool = False,
    earlier: Sequence[Row] = (),
    save: Callable[[Comparison], Any] | None = None,
    progress: bool = True,
    ready_targets: bool = False,
    seeds: Sequence[int] = (),
) -> Comparison:
    """A pre-edit row, then one row per hparams; the model is bit-equal to before after each.

    The model may be dense where all methods are EasyEdit's own, of whose rows then nothing is said of routing.

    Methods with the same target settings share the target vectors of the first batch, which all of them edit at the
    same weights; the seconds they took count for each. Later batches find their own, at the method's own weights,
    unless ``ready_targets`` asks for those that are found at the unedited weights for all records ("z ready"): shifts
    that each batch adds to the hidden states as they are when it begins. EasyEdit's methods find their own.

    Args:
        task: the model and the records.
        hparams: of each method.
        on_row: called with each row when it is made.
        labels: names of the rows where they are not the methods'.
        easyedit_metrics: also score each row by EasyEdit's own code and protocol.
        earlier: rows of a run of the same task that was interrupted; those with the same name, hparams and protocols
            are taken over instead of being made again.
        save: called after each row with all that are there.
        progress: show bars.
        ready_targets: give every batch of each method the same targets, so that only what is done with them differs.
        seeds: by each of which a random method is run, its row being their mean; by default every method runs once, by
            its hparams' seed.

    Raises:
        HostError: EasyEdit is asked for, by a method or for its metrics, and is not there. DenseModelError: a method of
            ours and a dense model.
    """
    _check_chat(task, hparams)
    _check_experts(task, hparams)
    if ready_targets:
        task = replace(task, provenance={**task.provenance, READY: True})
    names = [PRE_EDIT, *(labels or [hp.alg_name for hp in hparams])]
    settings = [None, *hparams]
    kept = [_reusable(earlier, name, hp, easyedit_metrics, seeds) for name, hp in zip(names, settings, strict=True)]
    rows = {number: row for number, row in enumerate(kept) if row is not None}
    judge = _Judge(task, easyedit_metrics, progress) if len(rows) < len(names) else None
    targets = SharedTargets(task, ready_targets, progress)
    for number, (name, hp) in enumerate(zip(names, settings, strict=True)):
        if judge is None or number in rows:
            continue
        rows[number] = _unedited(judge) if hp is None else _run_seeds(judge, hp, seeds, name, targets)
        if on_row:
            on_row(rows[number])
        if save:
            save(_so_far(task, rows, len(names), easyedit_metrics))
    return _so_far(task, rows, len(names), easyedit_metrics)


def _check_chat(task: Task, hparams: Sequence[MoEHyperParams | BaselineHyperParams]) -> None:
    for hp in hparams:
        if getattr(hp, "chat", False) != task.chat:
            raise HyperParamsError(
                f"{hp.alg_name} edits {'plain text' if task.chat else 'in a chat'}, but the records are judged "
                f"{'in a chat' if task.chat else 'as plain text'}. Compare methods of one kind; EasyEdit's own edit "
                "plain text."
            )


def _check_experts(task: Task, hparams: Sequence[MoEHyperParams | BaselineHyperParams]) -> None:
    ours = [hp.alg_name for hp in hparams if isinstance(hp, MoEHyperParams)]
    if ours and not has_experts(task.model):
        raise DenseModelError(
            f"{type(task.model).__name__} has no experts, which {', '.join(dict.fromkeys(ours))} would edit. Compare "
            "EasyEdit's own methods on it, such as --methods MEMIT,AlphaEdit with --hparams for their layers."
        )


def _so_far(task: Task, rows: Mapping[int, Row], wanted: int, easyedit_metrics: bool) -> Comparison:
    ordered = tuple(rows[number] for number in sorted(rows))
    protocols = {"scores": PROTOCOLS[task.protocol]} | ({"easyedit": PROTOCOL} if easyedit_metrics else {})
    settings = {row.method: row.hparams for row in ordered if row.hparams}
    about = {**task.provenance, "protocols": protocols, "hparams": settings}
    return Comparison(ordered, about, complete=len(ordered) == wanted)


def _reusable(
    earlier: Sequence[Row],
    name: str,
    hparams: MoEHyperParams | BaselineHyperParams | None,
    easyedit_metrics: bool,
    seeds: Sequence[int],
) -> Row | None:
    """The earlier row that would come out again, if there is one."""
    wanted = json_text({} if hparams is None else hparams.to_dict())
    by = tuple(seed for seed, _ in seeded(hparams, seeds)) if hparams is not None else ()
    for row in earlier:
        same = row.method == name and (row.easyedit is not None) == easyedit_metrics and row.seeds == by
        if same and json_text(row.hparams) == wanted:
            return row
    return None


class _Judge:
    """Scores a task's model, again and again; made on the unedited one, with whose routing it compares."""

    def __init__(self, task: Task, easyedit_metrics: bool, progress: bool) -> None:
        self.task, self.progress = task, progress
        self.quality = _easyedit_quality(task) if easyedit_metrics else None
        edited = [record.request.prompt for record in task.records]
        near = sorted({prompt for record in task.records for prompt, _ in record.neighbours})
        self._prompts = {"edit": edited, "preservation": list(task.preserved) or near or edited}
        asked = [prompt for prompts in self._prompts.values() for prompt in prompts]
        check_fit(task.model, task.tok, [(prompt, "") for prompt in (*asked, *near)], task.chat)
        routed = has_experts(task.model)
        self._before = {name: self._snapshot(name) for name in self._prompts} if routed else {}

    def _snapshot(self, name: str) -> RoutingSnapshot:
        return routing_snapshot(self.task.model, self.task.tok, self._prompts[name], chat=self.task.chat)

    def routing(self) -> dict[str, Any]:
        """Similarity of the experts picked now and at first, over edited prompts and over those to preserve.

        Nothing for a dense model.
        """
        return {name: routing_similarity(before, self._snapshot(name)) for name, before in self._before.items()}

    def scores(self, edits: int | None = None) -> EvaluationResult:
        """By the papers' protocol; of the first ``edits`` records, or all."""
        task = self.task
        records = task.records[:edits]
        return evaluate(task.model, task.tok, records, task.protocol, progress=self.progress, chat=task.chat)

    def answers(self) -> dict[str, Score] | None:
        """Of real answers, where they are asked for."""
        task = self.task
        if task.answers is None:
            return None
        found = real_answers(task.model, task.tok, task.records, task.answers, task.chat, self.progress)
        return {name: score for name, score in vars(found).items() if score is not None}

    def easyedit(self, label: str) -> dict[str, Score] | None:
        """By EasyEdit's protocol, where it is asked for."""
        return self.quality(label) if self.quality else None


def _unedited(judge: _Judge) -> Row:
    watch = Stopwatch()
    reset_peak_memory()
    with watch.stage("evaluate"):
        scores, answers = judge.scores(), judge.answers()
    peak = peak_memory_bytes()
    theirs = judge.easyedit(PRE_EDIT)
    return Row(
        PRE_EDIT, "nothing", "easyedit_moe", scores, judge.routing(), watch.seconds, peak, easyedit=theirs,
        answers=answers,
    )  # fmt: skip


Quality = Callable[[str], dict[str, Score]]


def _easyedit_quality(task: Task) -> Quality:
    from easyedit_moe.host.quality import EasyEditQuality

    return EasyEditQuality(task.model, task.tok, task.records).measure


def _run_seeds(
    judge: _Judge,
    hparams: MoEHyperParams | BaselineHyperParams,
    seeds: Sequence[int],
    label: str,
    targets: SharedTargets,
) -> Row:
    runs = seeded(hparams, seeds)
    if not runs:
        return _run_method(judge, hparams, label, targets)
    return pooled([_run_method(judge, one, label, targets) for _, one in runs], [seed for seed, _ in runs], hparams)


def _run_method(
    judge: _Judge, hparams: MoEHyperParams | BaselineHyperParams, label: str, targets: SharedTargets
) -> Row:
    watch, task, model = Stopwatch(), judge.task, judge.task.model
    reset_peak_memory()
    editor = make_editor(hparams, judge.progress)
    memory, reached = None, None
    told: list[str] = []
    reports: list[Any] = []
    way = RetentionWatch() if task.retention else None
    editor.check_requests(model, task.tok, [record.request for record in task.records])
    targets.before(editor)
    with _restored(model) as run:
        for start in range(0, len(task.records), task.batch_size):
            batch = [record.request for record in task.records[start : start + task.batch_size]]
            with warnings.catch_warnings():
                # They stand in the row instead of being told batch by batch.
                warnings.simplefilter("ignore", EditingWarning)
                result = _edit_batch(editor, task, batch, memory, targets, start)
            memory = result.memory
            reports += result.patch.reports
            run.add(result.patch)
            told += result.warnings
            if result.targets:
                reached = (reached or 0) + sum(int(t.reached.sum()) for t in result.targets)
            for stage, seconds in result.seconds.items():
                watch.seconds[stage] += seconds
            if way is not None:
                with watch.stage("evaluate"):
                    way.add(start + len(batch), judge.scores(start + len(batch)))
        retention = None if way is None else way.found()
        with watch.stage("evaluate"):
            scores = judge.scores() if retention is None else retention.batches[-1][1]
            answers = judge.answers()
        rounding = max((report.rounding_loss for report in reports), default=None)
        similarity, peak = judge.routing(), peak_memory_bytes()
        theirs = judge.easyedit(label)
    return Row(
        label, editor.edits, editor.code, scores, similarity, watch.seconds, peak, reached, rounding,
        hparams.to_dict(), theirs, tuple(told), retention=retention, answers=answers,
    )  # fmt: skip


def _edit_batch(
    editor: Editor, task: Task, batch: list[EditRequest], memory: Any, targets: SharedTargets, start: int
) -> EditResult:
    given = targets.of_batch(editor, start, start + len(batch))
    return targets.after(editor, start, given, editor.edit(task.model, task.tok, batch, memory, given))


@contextmanager
def _restored(model: nn.Module) -> Iterator[AppliedRun]:
    """A run of patches; whatever happens inside, the originals of all of them are back afterwards."""
    with intact(model) as hold:
        run = AppliedRun(model, hold)
        try:
            yield run
        finally:
            run.restore()
