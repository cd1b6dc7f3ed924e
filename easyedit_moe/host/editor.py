"""The editor that EasyEdit's ``BaseEditor.from_hparams`` makes for our hparams; this file imports EasyEdit."""

from __future__ import annotations

import copy as copying
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from easyeditor.editors import editor as host
from torch import nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.editor import EditCalls, Kept, Scorer
from easyedit_moe.editors.base import APPLY_KEYWORDS
from easyedit_moe.editors.keywords import check_keywords
from easyedit_moe.editors.remembering import remember, remember_copy, remembered
from easyedit_moe.errors import HostError, HyperParamsError
from easyedit_moe.facts.easyedit_requests import HostRequest, checked_batches
from easyedit_moe.host.padding import name_for_host, padded
from easyedit_moe.host.scoring import SCORING_SETTINGS, check_fluency, scoring_settings
from easyedit_moe.hparams import MoEHyperParams
from easyedit_moe.moe.holding import intact
from easyedit_moe.moe.loading import load_model
from easyedit_moe.patches.weights import WeightPatch
from easyedit_moe.storage.strict_json import write_json


class HostEditor(EditCalls, host.BaseEditor):
    """A BaseEditor with one of our methods: EasyEdit's calls, metrics, logs and results, on any MoE model.

    What differs from EasyEdit's own loops: the model is loaded by `easyedit_moe.moe.loading.load_model` (dtype of the
    hparams, the model's own tokenizer, MXFP4 dequantised) whatever its name contains; ``hparams.model_name`` may be a
    ``(model, tok)`` pair; ``edit`` works whatever ``batch_size`` says; all requests are checked before the first is
    edited; statistics and eigendecompositions are kept between calls; and if scoring fails after an edit, the edit that
    was being scored is taken back.
    """

    case_id_per_batch = True
    options = (
        "eval_metric", "test_generation", "pre_edit", "pre_file", "metric_kwargs", *SCORING_SETTINGS,
    )  # fmt: skip

    def __init__(self, hparams: MoEHyperParams) -> None:
        """Load the model unless ``hparams.model_name`` is a pair.

        Raises:
            HyperParamsError: not our hparams, or unusable ones. DataError: the checkpoint can't be loaded.
        """
        if not isinstance(hparams, MoEHyperParams):
            raise HyperParamsError(f"HostEditor needs hparams of easyedit_moe; found {type(hparams).__name__}.")
        if isinstance(hparams.model_name, str):
            name = hparams.model_name
            hparams = replace(hparams)  # checked anew, since fields can be set after reading
            self.model, self.tok = load_model(
                name,
                hparams.dtype,
                hparams.device,
                hparams.model_parallel,
                trust_remote_code=hparams.trust_remote_code,
            )
            # As EasyEdit does for methods that it does not know; nothing of ours depends on it.
            self.tok.padding_side = "left"
        else:
            self.model, self.tok = _pair(hparams.model_name)
            name = getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__
        self.hparams = replace(hparams, model_name=name, device=str(next(self.model.parameters()).device))
        self.kept = Kept()
        self.model_name, self.alg_name = name_for_host(self.model), self.hparams.alg_name
        self.apply_algo = self._apply
        self.device = next(self.model.parameters()).device
        if not host.LOG.handlers:  # a second editor would write each line twice
            host.make_logs()

    def scorer(self, **options: Any) -> Scorer:
        """EasyEdit's own metrics; of its options count eval_metric, test_generation, pre_edit, pre_file, metric_kwargs.

        ``pre_edit`` are scores before the edits from an earlier run, ``pre_file`` is where they are written to. What
        EasyEdit's metrics read from the hparams of its own methods are options, too: ``evaluation_type``
        ("LLM-judge" or "generate-text"), ``api_key`` (of the judge) and ``use_chat_template`` (for what is asked; by
        default as the hparams' ``chat``, which says how the edit takes the prompts).

        Raises:
            KeywordError: an evaluation_type that EasyEdit does not have, an api_key without a judge, or a tokenizer
                without the chat template that is asked for.
            HostError: a package is missing that the scores need; see `easyedit_moe.host.scoring`.
        """
        return EasyEditScorer(self, **options)

    def forget_edits(self) -> None:
        """Drop the keys of earlier sequential edits, after their weights were restored by hand."""
        self.kept = Kept()

    def _apply(
        self,
        model: nn.Module,
        tok: PreTrainedTokenizerBase,
        requests: Sequence[Any],
        hparams: MoEHyperParams,
        copy: bool = False,
        return_orig_weights: bool = False,
        keep_original_weight: bool = False,
        **kwargs: Any,
    ) -> tuple[nn.Module, Any]:
        """EasyEdit's ``apply_algo``: as ``apply_to_model``, but what was prepared is kept.

        With ``remember_edits`` it goes on from the sequential edits of the other calls until it remembers its own.
        """
        check_keywords("apply_algo", kwargs, (), APPLY_KEYWORDS)
        (batch,) = checked_batches([requests])
        before, remembers = (self.hparams, self.model, self.kept), getattr(hparams, "remember_edits", False)
        edited, weights = copying.deepcopy(model) if copy else model, {}
        with intact(edited):
            try:
                self.hparams, self.model = hparams, edited
                if remembers:
                    remember_copy(model, edited)
                    self.kept = replace(self.kept, memory=remembered(edited, hparams) or self.kept.memory)
                result = self._edit(batch)
            finally:
                self.hparams, self.model, self.kept = before
            if return_orig_weights or keep_original_weight:
                weights = result.patch.weights_copy(edited)
            if remembers and isinstance(result.patch, WeightPatch):
                remember(edited, hparams, result.memory, result.patch)
        return edited, weights

    def _scope(self) -> AbstractContextManager[Any]:
        return padded(self.tok)

    def _report(self, entry: Mapping[str, Any]) -> None:
        rewrite = entry["requested_rewrite"]
        host.LOG.info(f"{entry['case_id']} editing: {rewrite['prompt']} -> {rewrite['target_new']}  \n\n {dict(entry)}")

    def _finished(self, metrics: list[dict[str, Any]]) -> None:
        if hasattr(host, "summary_metrics"):  # it only writes a log and a file beside it
            host.summary_metrics(metrics)


class EasyEditScorer:
    """Scores by EasyEdit's ``compute_edit_quality``, request by request."""

    def __init__(
        self,
        editor: HostEditor,
        eval_metric: str = "exact match",
        test_generation: bool = False,
        pre_edit: Sequence[Mapping[str, Any]] | None = None,
        pre_file: str | Path | None = None,
        metric_kwargs: Sequence[Any] | None = None,
        evaluation_type: str | None = None,
        api_key: str | None = None,
        use_chat_template: bool | None = None,
        **without_effect: Any,
    ) -> None:
        in_chat = editor.hparams.chat if use_chat_template is None else use_chat_template
        self.settings = scoring_settings(editor.tok, evaluation_type, api_key, in_chat)
        if test_generation:
            check_fluency()
        self.editor, self.metric_kwargs, self.pre_file = editor, metric_kwargs, pre_file
        self.options = {"eval_metric": eval_metric, "test_generation": test_generation}
        self.known = None if pre_edit is None else [entry["pre"] for entry in pre_edit]

    def before(self, batch: Sequence[HostRequest]) -> list[Any]:
        """EasyEdit's scores of the model as it is, or those that ``pre_edit`` gave."""
        if self.known is not None:
            return [self.known.pop(0) for _ in batch]
        return [self._quality(request) for request in batch]

    def measured(self, before: Sequence[Any]) -> None:
        """Write the scores before the edits to ``pre_file``, if there is one."""
        if self.pre_file is not None:
            write_json(self.pre_file, [{"pre": value} for value in before], indent=4)

    def after(self, number: int, batch: Sequence[HostRequest]) -> list[Any]:
        """EasyEdit's scores of the edited model, and its sentence metrics where ``metric_kwargs`` ask for them."""
        found = []
        for i, request in enumerate(batch):
            more = {} if self.metric_kwargs is None else self._sentences(self.metric_kwargs[number + i])
            found.append({"post": self._quality(request), **more})
        return found

    def entry(self, request: HostRequest, before: Any, after: Any) -> dict[str, Any]:
        """One request's scores, with locality as EasyEdit makes it from those before and after."""
        entry = {"pre": before, **after}
        host.finalize_locality_metrics(entry, request.record, self._hparams(), self.editor.model_name)
        return entry

    def _quality(self, request: HostRequest) -> Any:
        e = self.editor
        return host.compute_edit_quality(
            e.model, e.model_name, self._hparams(), e.tok, request.record, e.hparams.device, **self.options
        )

    def _hparams(self) -> Any:
        """The editor's, with the settings of EasyEdit's scores, which ours do not have."""
        hparams = copying.copy(self.editor.hparams)
        vars(hparams).update(self.settings)
        return hparams

    def _sentences(self, wanted: Any) -> Any:
        e = self.editor
        if not hasattr(host, "compute_sent_metric"):
            raise HostError("This EasyEdit has no compute_sent_metric, which metric_kwargs ask for; leave them out.")
        return host.compute_sent_metric(
            e.model, e.model, e.model_name, e.hparams, e.tok, metric_kwargs=wanted, device=e.hparams.device
        )


def _pair(given: Any) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    fits = isinstance(given, (tuple, list)) and len(given) == 2
    if not fits or not isinstance(given[0], nn.Module) or not callable(given[1]):
        raise HyperParamsError(
            f"model_name must be a name, a folder, or a pair (model, tokenizer); found {type(given).__name__}."
        )
    return given[0], given[1]
