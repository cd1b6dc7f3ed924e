"""The stand-alone editor: EasyEdit's calls and shapes of results, without EasyEdit."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.editors import EditResult, Patch, make_editor
from easyedit_moe.errors import RequestError
from easyedit_moe.evaluation.scoring import TargetScore, score_targets
from easyedit_moe.facts.easyedit_requests import checked_batches, prompts_of, requests_from_columns
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.hparams import MoEHyperParams, load_hyperparams
from easyedit_moe.moe.loading import load_model

logger = logging.getLogger(__name__)

Results = tuple[list[dict[str, Any]], nn.Module, dict[str, Tensor]]


class MoEEditor:
    """Edits a model by one method and reports EasyEdit's metrics (teacher-forced token accuracies).

    Attributes:
        model, tok: edited in place.
        patches: applied and not undone, oldest first. ``undo()`` reverts the newest one bit-exactly.
    """

    def __init__(self, hparams: MoEHyperParams, model: nn.Module, tok: PreTrainedTokenizerBase) -> None:
        self.hparams, self.model, self.tok = hparams, model, tok
        self.editor = make_editor(hparams)
        self.memory: Any = None
        self.patches: list[Patch] = []
        self._memories: list[Any] = []

    @classmethod
    def from_hparams(
        cls,
        hparams: MoEHyperParams | str | Path,
        model: nn.Module | None = None,
        tok: PreTrainedTokenizerBase | None = None,
        device_map: Any = None,
    ) -> MoEEditor:
        """An editor for hparams (or a YAML file's path); loads model and tokenizer unless both are given.

        Raises:
            HyperParamsError, DataError: unusable hparams or checkpoint. RequestError: only one of model and tok.
        """
        if isinstance(hparams, (str, Path)):
            hparams = load_hyperparams(hparams)
        if (model is None) != (tok is None):
            raise RequestError("Pass model and tok together, or neither.")
        if model is None:
            model, tok = load_model(
                hparams.model_name, hparams.dtype, hparams.device, hparams.model_parallel, device_map
            )
        return cls(hparams, model, tok)

    def edit(
        self,
        prompts: str | Sequence[str],
        target_new: str | Sequence[str],
        ground_truth: str | Sequence[str] | None = None,
        target_neg: str | Sequence[str] | None = None,
        rephrase_prompts: str | Sequence[str] | None = None,
        locality_inputs: Mapping[str, Mapping[str, Any]] | None = None,
        portability_inputs: Mapping[str, Mapping[str, Any]] | None = None,
        sequential_edit: bool = False,
        verbose: bool = True,
        subject: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Results:
        """One edit after the other; unless ``sequential_edit``, each is reverted bit-exactly before the next.

        Arguments and results are EasyEdit's: metrics per request with "pre" and "post" (``rewrite_acc``,
        ``rephrase_acc``, ``locality`` -> ``<key>_acc``, ``portability`` -> ``<key>_acc``), the model, and the original
        tensors that the last edit changed. ``target_neg`` is carried along and unused.

        Raises:
            RequestError: missing subjects, lists of different lengths, or requests that can't be used.
        """
        requests = kwargs.get("requests") or requests_from_columns(
            prompts,
            target_new,
            ground_truth,
            target_neg,
            rephrase_prompts,
            locality_inputs,
            portability_inputs,
            subject,
        )
        return self.edit_requests(requests, sequential_edit, verbose)

    def edit_requests(
        self, requests: Sequence[Mapping[str, Any] | EditRequest], sequential_edit: bool = False, verbose: bool = True
    ) -> Results:
        """As :meth:`edit`, with request dicts (EasyEdit's or ROME's) or :class:`EditRequest` values."""
        return self._run([[request] for request in requests], sequential_edit, verbose, pre_first=True)

    def batch_edit(
        self,
        prompts: Sequence[str],
        target_new: Sequence[str],
        ground_truth: Sequence[str] | None = None,
        target_neg: Sequence[str] | None = None,
        rephrase_prompts: Sequence[str] | None = None,
        locality_inputs: Mapping[str, Mapping[str, Any]] | None = None,
        portability_inputs: Mapping[str, Mapping[str, Any]] | None = None,
        sequential_edit: bool = False,
        verbose: bool = True,
        subject: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Results:
        """As :meth:`edit`, ``hparams.batch_size`` requests at a time."""
        requests = requests_from_columns(
            prompts,
            target_new,
            ground_truth,
            target_neg,
            rephrase_prompts,
            locality_inputs,
            portability_inputs,
            subject,
        )
        size = self.hparams.batch_size
        batches = [requests[start : start + size] for start in range(0, len(requests), size)]
        return self._run(batches, sequential_edit, verbose, pre_first=False)

    def undo(self) -> None:
        """Revert the newest edit that is still in the model, bit-exactly.

        Raises:
            PatchError: the weights were changed by something else since.
            RequestError: there is nothing to undo.
        """
        if not self.patches:
            raise RequestError("There is no edit to undo.")
        self.patches[-1].revert(self.model)
        self.patches.pop()
        self.memory = self._memories.pop()

    def _run(
        self,
        batches: Sequence[Sequence[Mapping[str, Any] | EditRequest]],
        sequential: bool,
        verbose: bool,
        pre_first: bool,
    ) -> Results:
        batches = checked_batches(batches)
        metrics: list[dict[str, Any]] = []
        before = [self._measure(batch) for batch in batches] if pre_first else []
        weights: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            pre = before[number] if pre_first else self._measure(batch)
            start = time.perf_counter()
            result = self._edit(batch)
            seconds = time.perf_counter() - start
            if number == len(batches) - 1:
                weights = result.patch.weights_copy(self.model)
            try:
                post = self._measure(batch)
            finally:
                if not sequential:
                    self.undo()
            for request, old, new in zip(batch, pre, post, strict=True):
                metrics.append(_metrics_entry(len(metrics), request, old, new, seconds))
                if verbose:
                    logger.info("%s -> %s: %s", request["prompt"], request["target_new"], metrics[-1]["post"])
        return metrics, self.model, weights

    def _edit(self, batch: Sequence[Mapping[str, Any]]) -> EditResult:
        result = self.editor.edit(self.model, self.tok, batch, self.memory)
        self.patches.append(result.patch)
        self._memories.append(self.memory)
        self.memory = result.memory
        return result

    def _measure(self, batch: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Scores of every prompt of every request, keyed by its place in the result."""
        places: list[tuple[int, tuple[str, ...]]] = []
        pairs: list[tuple[str, str]] = []
        for i, request in enumerate(batch):
            for place, prompt, target in prompts_of(request):
                places.append((i, place))
                pairs.append((prompt, target))
        found: list[dict[str, Any]] = [{} for _ in batch]
        scores = score_targets(self.model, self.tok, pairs)
        for (i, place), score in zip(places, scores, strict=True):
            found[i].setdefault(place, []).append(score)
        return found


def _metrics_entry(
    case_id: int, request: Mapping[str, Any], old: dict[str, Any], new: dict[str, Any], seconds: float
) -> dict[str, Any]:
    entry: dict[str, Any] = {"case_id": case_id, "requested_rewrite": dict(request), "time": seconds}
    for phase, found in (("pre", old), ("post", new)):
        section: dict[str, Any] = {"locality": {}, "portability": {}}
        for place, scores in found.items():
            if place[0] in ("rewrite", "rephrase"):
                section[f"{place[0]}_acc"] = [s.token_accuracy for s in scores]
            elif place[0] == "portability":
                section["portability"][f"{place[1]}_acc"] = [s.token_accuracy for s in scores]
            elif phase == "post":
                section["locality"][f"{place[1]}_acc"] = _unchanged(old[place], scores)
        entry[phase] = section
    return entry


def _unchanged(before: Sequence[TargetScore], after: Sequence[TargetScore]) -> list[float]:
    """Share of predicted tokens that are the same before and after, which is what EasyEdit calls locality."""
    return [
        sum(a == b for a, b in zip(x.predicted, y.predicted, strict=True)) / len(x.predicted)
        for x, y in zip(before, after, strict=True)
    ]
