"""The editor that EasyEdit's ``BaseEditor.from_hparams`` makes for our hparams; this file imports EasyEdit."""

from __future__ import annotations

import copy as copying
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from easyeditor.editors.editor import LOG, BaseEditor, make_logs
from torch import nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.editors import Editor, Patch, make_editor
from easyedit_moe.errors import HyperParamsError
from easyedit_moe.facts.easyedit_requests import checked_batches, requests_from_columns
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.host.padding import name_for_host, padded
from easyedit_moe.hparams import MoEHyperParams
from easyedit_moe.moe.loading import load_model


class HostEditor(BaseEditor):
    """EasyEdit's BaseEditor with one of our methods: its edit loops, metrics and results, on any MoE model.

    What differs from a BaseEditor: the model is loaded by :func:`easyedit_moe.moe.loading.load_model` (dtype of the
    hparams, the model's own tokenizer, MXFP4 dequantised) whatever its name contains; ``hparams.model_name`` may be a
    ``(model, tok)`` pair; ``edit`` works whatever ``batch_size`` says; all requests are checked before the first is
    edited; statistics and eigendecompositions are kept between calls; and if scoring fails after an edit, the edit that
    was being scored is taken back.
    """

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
            self.model, self.tok = load_model(name, hparams.dtype, hparams.device, hparams.model_parallel)
            # As EasyEdit does for methods that it does not know; nothing of ours depends on it.
            self.tok.padding_side = "left"
        else:
            self.model, self.tok = _pair(hparams.model_name)
            name = getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__
        self.hparams = replace(hparams, model_name=name, device=str(next(self.model.parameters()).device))
        self.model_name, self.alg_name = name_for_host(self.model), self.hparams.alg_name
        self.apply_algo = self._apply
        self.device = next(self.model.parameters()).device
        self._editor: Editor | None = None
        self._memory: Any = None
        self._sequential = False
        self._unscored: _Unscored | None = None
        if not LOG.handlers:  # a second editor would write each line twice
            make_logs()

    def edit(
        self,
        prompts: str | Sequence[str],
        target_new: str | Sequence[str],
        ground_truth: str | Sequence[str] | None = None,
        target_neg: str | Sequence[str] | None = None,
        rephrase_prompts: str | Sequence[str] | None = None,
        locality_inputs: Mapping[str, Any] | None = None,
        portability_inputs: Mapping[str, Any] | None = None,
        sequential_edit: bool = False,
        verbose: bool = True,
        **kwargs: Any,
    ) -> Any:
        """EasyEdit's ``edit``; a text and a list of one text are the same.

        Raises:
            RequestError: no subject, lists of different lengths, or a request that can't be used.
        """
        requests = kwargs.pop("requests", None)
        if requests is not None:  # EasyEdit's own takes the argument, and then hands it on twice
            return self.edit_requests(requests, sequential_edit, verbose, **kwargs)
        columns = (prompts, target_new, ground_truth, target_neg, rephrase_prompts)
        given, requests = _arguments(columns, (locality_inputs, portability_inputs), kwargs)
        checked_batches([[request] for request in requests])
        return super().edit(*given, sequential_edit, verbose, **kwargs)

    def batch_edit(
        self,
        prompts: Sequence[str],
        target_new: Sequence[str],
        ground_truth: Sequence[str] | None = None,
        target_neg: Sequence[str] | None = None,
        rephrase_prompts: Sequence[str] | None = None,
        locality_inputs: Mapping[str, Any] | None = None,
        portability_inputs: Mapping[str, Any] | None = None,
        sequential_edit: bool = False,
        verbose: bool = True,
        **kwargs: Any,
    ) -> Any:
        """EasyEdit's ``batch_edit``, ``hparams.batch_size`` requests at a time. Raises as :meth:`edit` does."""
        columns = (prompts, target_new, ground_truth, target_neg, rephrase_prompts)
        given, requests = _arguments(columns, (locality_inputs, portability_inputs), kwargs)
        size = replace(self.hparams).batch_size  # checked anew, since it can be set after reading
        checked_batches([requests[start : start + size] for start in range(0, len(requests), size)])
        with self._session(sequential_edit):
            return super().batch_edit(*given, sequential_edit, verbose, **kwargs)

    def edit_requests(
        self,
        requests: Sequence[Mapping[str, Any] | EditRequest],
        sequential_edit: bool = False,
        verbose: bool = True,
        test_generation: bool = False,
        **kwargs: Any,
    ) -> Any:
        """EasyEdit's ``edit_requests``: one edit after the other. Takes ROME's dicts and EditRequest values, too.

        Raises:
            RequestError: a request can't be used; none was edited then.
        """
        kwargs.pop("requests", None)
        singles = [batch[0] for batch in checked_batches([[request] for request in requests])]
        with self._session(sequential_edit), self._one_at_a_time():
            return super().edit_requests(singles, sequential_edit, verbose, test_generation, **kwargs)

    def normal_edit(
        self,
        prompts: Sequence[str],
        target_new: Sequence[str],
        sequential_edit: bool = False,
        subject: Sequence[str] | None = None,
    ) -> Any:
        """EasyEdit's ``normal_edit``: all requests as one batch, without metrics.

        Returns None, the model and the original tensors. The weights are put back unless ``sequential_edit``, which
        EasyEdit's own ignores; it also has no ``subject``, which our methods need.

        Raises:
            RequestError: no subject, or requests that can't be used.
        """
        requests = requests_from_columns(prompts, target_new, None, None, None, None, None, subject)
        (requests,) = checked_batches([requests])
        with self._session(sequential_edit):
            edited, weights = self._apply(self.model, self.tok, requests, self.hparams, return_orig_weights=True)
            if not sequential_edit:
                self._unscored.patch.restore(edited)
        return None, edited, weights

    def generate_edit(
        self,
        prompts: str | Sequence[str],
        target_new: str | Sequence[str],
        ground_truth: str | Sequence[str] | None = None,
        target_neg: str | Sequence[str] | None = None,
        rephrase_prompts: str | Sequence[str] | None = None,
        locality_inputs: Mapping[str, Any] | None = None,
        portability_inputs: Mapping[str, Any] | None = None,
        sequential_edit: bool = False,
        verbose: bool = True,
        **kwargs: Any,
    ) -> Any:
        """EasyEdit's ``generate_edit``: answers by free generation. Raises as :meth:`edit` does."""
        columns = (prompts, target_new, ground_truth, target_neg, rephrase_prompts)
        given, listed = _arguments(columns, (locality_inputs, portability_inputs), kwargs)
        checked_batches([[request] for request in kwargs.get("requests") or listed])
        with self._session(sequential_edit), self._one_at_a_time():
            return super().generate_edit(*given, sequential_edit, verbose, **kwargs)

    def forget_edits(self) -> None:
        """Drop the keys of earlier sequential edits, after their weights were restored by hand."""
        self._memory = None

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
        """As ``apply_to_model``, but keeps what was prepared, and in a sequential run the memory of earlier edits."""
        if copy:
            model = copying.deepcopy(model)
        settings = replace(hparams, batch_size=1)
        if self._editor is None or self._editor.hparams != settings:
            self._editor = make_editor(settings, progress=False)
        self._unscored = None
        result = self._editor.edit(model, tok, requests, self._memory)
        self._unscored = _Unscored(model, result.patch, self._memory)
        if self._sequential:
            self._memory = result.memory
        return model, result.patch.weights_copy(model) if return_orig_weights or keep_original_weight else {}

    @contextmanager
    def _session(self, sequential: bool) -> Iterator[None]:
        self._sequential, self._unscored = sequential, None
        try:
            with padded(self.tok):
                yield
        except BaseException:
            if self._unscored is not None:
                self._unscored.patch.restore(self._unscored.model)
                self._memory = self._unscored.memory
            raise
        finally:
            self._sequential, self._unscored = False, None

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        # EasyEdit asserts batch_size == 1 in its loop over single edits, though the size means nothing there.
        hparams = self.hparams
        self.hparams = replace(hparams, batch_size=1)
        try:
            yield
        finally:
            self.hparams = hparams


@dataclass(frozen=True)
class _Unscored:
    """The newest edit, until the next one: what to put back if its scoring fails."""

    model: nn.Module
    patch: Patch
    memory: Any


def _arguments(
    columns: Sequence[Any], inputs: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[list[Any], list[dict[str, Any]]]:
    """Positional arguments as EasyEdit insists on them, likewise ``kwargs["subject"]``, and the requests they make."""
    kwargs["subject"] = _listed(kwargs.get("subject"))
    given = [*map(_listed, columns), *map(_copied, inputs)]
    return given, [] if kwargs.get("requests") else requests_from_columns(*given, kwargs["subject"])


def _listed(values: Any) -> Any:
    """A list, which EasyEdit insists on; what is no sequence is left for the check of requests."""
    if isinstance(values, str):
        return [values]
    return list(values) if isinstance(values, Sequence) else values


def _copied(inputs: Mapping[str, Any] | None) -> Any:
    """EasyEdit writes into such dicts."""
    if inputs is None:
        return None
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in inputs.items()}


def _pair(given: Any) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    fits = isinstance(given, (tuple, list)) and len(given) == 2
    if not fits or not isinstance(given[0], nn.Module) or not callable(given[1]):
        raise HyperParamsError(
            f"model_name must be a name, a folder, or a pair (model, tokenizer); found {type(given).__name__}."
        )
    return given[0], given[1]
