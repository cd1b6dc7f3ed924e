"""Target vectors that the methods of a comparison share: found once, at the unedited weights ("z ready")."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from easyedit_moe.comparison.task import Task
from easyedit_moe.editors import Editor, EditResult
from easyedit_moe.hparams.sites import EXPERTS
from easyedit_moe.measure import Stopwatch
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.targets.cache import found_targets
from easyedit_moe.targets.search import TargetVectors

READY = "ready_targets"
"""Key of a comparison's provenance: whether every batch had its targets ready."""


@dataclass
class SharedTargets:
    """Targets by the settings that they were found with.

    Attributes:
        task: whose model is unedited whenever a method begins.
        every_batch: whether those of all records are found before the first edit. Otherwise a method finds those of its
            first batch, which all edit at the same weights, and later batches find their own.
        progress: show bars.
    """

    task: Task
    every_batch: bool
    progress: bool
    _found: dict[Any, tuple[TargetVectors, float]] = field(default_factory=dict)

    def before(self, editor: Editor) -> None:
        """Find the targets of all records, where they are wanted and not there yet; the model must be unedited."""
        settings, key = editor.target_settings(), _key(editor)
        if not self.every_batch or settings is None or key in self._found:
            return
        watch, view = Stopwatch(), MoELayerView(self.task.model, site=_site(editor))
        requests = [record.request for record in self.task.records]
        with watch.stage("targets"):
            found = found_targets(editor.hparams, settings, view, self.task.tok, requests, self.progress)
        self._found[key] = found, watch.seconds["targets"]

    def of_batch(self, editor: Editor, start: int, stop: int) -> TargetVectors | None:
        """Those of records ``start`` to ``stop``; None where the method is to find them itself."""
        if not self._shares(editor, start):
            return None
        found, _ = self._found.get(_key(editor), (None, 0.0))
        return None if found is None else found.rows(start, stop)

    def after(self, editor: Editor, start: int, given: TargetVectors | None, result: EditResult) -> EditResult:
        """The result with the seconds that its targets took, once per method; what a first batch found is kept."""
        if not self._shares(editor, start):
            return result
        key = _key(editor)
        if given is None:
            self._found[key] = result.targets[0], result.seconds["targets"]
            return result
        seconds = 0.0 if start else self._found[key][1]
        return replace(result, seconds={**result.seconds, "targets": seconds})

    def _shares(self, editor: Editor, start: int) -> bool:
        if editor.target_settings() is None:
            return False
        return self.every_batch or (start == 0 and getattr(editor.hparams, "edits_per_solve", None) is None)


def _site(editor: Editor) -> str:
    return getattr(editor.hparams, "site", EXPERTS)


def _key(editor: Editor) -> Any:
    """What targets depend on besides the records; also the site, as they are sought among what it can bring about."""
    return editor.target_settings(), _site(editor)
