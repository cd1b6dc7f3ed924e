"""Editors side by side: each edits the same restored model in sequential batches and is judged after all edits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from easyedit_moe.comparison.task import Task
from easyedit_moe.editors import Editor, EditResult, Patch, make_editor
from easyedit_moe.errors import EditingWarning
from easyedit_moe.evaluation.metrics import EvaluationResult, Score, evaluate, routing_similarity, routing_snapshot
from easyedit_moe.facts.records import PROTOCOLS
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.host.baseline_hparams import PROTOCOL, BaselineHyperParams
from easyedit_moe.hparams import MoEHyperParams
from easyedit_moe.measure import Stopwatch, peak_memory_bytes, reset_peak_memory
from easyedit_moe.targets.search import TargetVectors

PRE_EDIT = "pre-edit"


@dataclass(frozen=True)
class Row:
    """One line of the table: a method's scores after all edits, and what they cost.

    ``scores`` follow the papers' protocol, ``easyedit`` EasyEdit's own (None unless asked for). ``rounding_loss`` is
    the largest share of an update that the weights' dtype swallowed at one write.
    """

    method: str
    edits: str
    code: str
    scores: EvaluationResult
    routing: dict[str, Any]
    seconds: dict[str, float]
    peak_memory_bytes: int
    targets_reached: int | None = None
    rounding_loss: float | None = None
    hparams: dict[str, Any] = field(default_factory=dict)
    easyedit: dict[str, Score] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        scores = self.scores.to_dict()
        return {
            "method": self.method,
            "edits": self.edits,
            "code": self.code,
            **{name: scores[name] for name in ("efficacy", "generalisation", "specificity", "utility", "exact_match")},
            "routing_similarity": self.routing,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "targets_reached": self.targets_reached,
            "rounding_loss": self.rounding_loss,
            "easyedit": None if self.easyedit is None else {name: asdict(s) for name, s in self.easyedit.items()},
            "hparams": self.hparams,
        }


@dataclass(frozen=True)
class Comparison:
    """All rows, and everything needed to make them again."""

    rows: tuple[Row, ...]
    provenance: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Content of results.json (schema 1)."""
        return {"schema": 1, "rows": [row.to_dict() for row in self.rows], "provenance": self.provenance}


def compare(
    task: Task,
    hparams: Sequence[MoEHyperParams | BaselineHyperParams],
    on_row: Callable[[Row], None] | None = None,
    labels: Sequence[str] = (),
    easyedit_metrics: bool = False,
) -> Comparison:
    """A pre-edit row, then one row per hparams; the model is bit-equal to before after each.

    Methods with the same target settings share the target vectors of the first batch, which all of them edit at the
    same weights; the seconds they took count for each. Later batches find their own, at the method's own weights.

    Args:
        task: the model and the records.
        hparams: of each method.
        on_row: called with each finished row.
        labels: names of the rows where they are not the methods'.
        easyedit_metrics: also score each row by EasyEdit's own code and protocol.

    Raises:
        HostError: EasyEdit is asked for, by a method or for its metrics, and is not there.
    """
    quality = _easyedit_quality(task) if easyedit_metrics else None
    edit_prompts = [record.request.prompt for record in task.records]
    kept_prompts = sorted({prompt for record in task.records for prompt, _ in record.neighbours})
    model, tok = task.model, task.tok
    before = {
        "edit": routing_snapshot(model, tok, edit_prompts),
        "preservation": routing_snapshot(model, tok, kept_prompts or edit_prompts),
    }

    def routing() -> dict[str, Any]:
        return {
            "edit": routing_similarity(before["edit"], routing_snapshot(model, tok, edit_prompts)),
            "preservation": routing_similarity(
                before["preservation"], routing_snapshot(model, tok, kept_prompts or edit_prompts)
            ),
        }

    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        if on_row:
            on_row(row)

    watch = Stopwatch()
    reset_peak_memory()
    with watch.stage("evaluate"):
        scores = evaluate(model, tok, task.records, task.protocol)
    peak = peak_memory_bytes()
    theirs = quality(PRE_EDIT) if quality else None
    add(Row(PRE_EDIT, "nothing", "easyedit_moe", scores, routing(), watch.seconds, peak, easyedit=theirs))
    ready: ReadyTargets = {}
    for number, hp in enumerate(hparams):
        add(_run_method(task, hp, labels[number] if labels else hp.alg_name, routing, ready, quality))
    settings = {row.method: row.hparams for row in rows if row.hparams}
    protocols = {"scores": PROTOCOLS[task.protocol]} | ({"easyedit": PROTOCOL} if easyedit_metrics else {})
    return Comparison(tuple(rows), {**task.provenance, "protocols": protocols, "hparams": settings})


ReadyTargets = dict[Any, tuple[TargetVectors, float]]
Quality = Callable[[str], dict[str, Score]]


def _easyedit_quality(task: Task) -> Quality:
    from easyedit_moe.host.quality import EasyEditQuality

    return EasyEditQuality(task.model, task.tok, task.records).measure


def _run_method(
    task: Task,
    hparams: MoEHyperParams | BaselineHyperParams,
    label: str,
    routing: Callable[[], dict[str, Any]],
    ready: ReadyTargets,
    quality: Quality | None,
) -> Row:
    watch, model = Stopwatch(), task.model
    reset_peak_memory()
    editor = make_editor(hparams)
    memory, reached = None, None
    patches: list[Patch] = []
    with _restored(model, patches):
        for start in range(0, len(task.records), task.batch_size):
            batch = [record.request for record in task.records[start : start + task.batch_size]]
            with warnings.catch_warnings():
                # Targets that are not reached are counted in the row instead of being told batch by batch.
                warnings.simplefilter("ignore", EditingWarning)
                result = _edit_batch(editor, task, batch, memory, ready, first=start == 0)
            memory = result.memory
            patches.append(result.patch)
            if result.targets:
                reached = (reached or 0) + sum(int(t.reached.sum()) for t in result.targets)
            for stage, seconds in result.seconds.items():
                watch.seconds[stage] += seconds
        with watch.stage("evaluate"):
            scores = evaluate(model, task.tok, task.records, task.protocol)
        rounding = max((report.rounding_loss for patch in patches for report in patch.reports), default=None)
        similarity, peak = routing(), peak_memory_bytes()
        theirs = quality(label) if quality else None
    return Row(
        label, editor.edits, editor.code, scores, similarity, watch.seconds, peak, reached, rounding,
        hparams.to_dict(), theirs,
    )  # fmt: skip


def _edit_batch(
    editor: Editor, task: Task, batch: list[EditRequest], memory: Any, ready: ReadyTargets, first: bool
) -> EditResult:
    settings = editor.target_settings()
    shared = first and settings is not None and getattr(editor.hparams, "edits_per_solve", None) is None
    targets, seconds = ready.get(settings, (None, 0.0)) if shared else (None, 0.0)
    result = editor.edit(task.model, task.tok, batch, memory, targets)
    if targets is not None:
        return replace(result, seconds={**result.seconds, "targets": seconds})
    if shared:
        ready[settings] = (result.targets[0], result.seconds["targets"])
    return result


@contextmanager
def _restored(model: nn.Module, patches: list[Patch]) -> Iterator[None]:
    """Whatever happens inside, the originals of all patches are back afterwards."""
    try:
        yield
    finally:
        with ExitStack() as stack:  # the newest first, and each whatever another raises
            for patch in patches:
                stack.callback(patch.restore, model)
