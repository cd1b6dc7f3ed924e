"""EasyEdit's calls and shapes of results: one implementation for every home, and the stand-alone editor."""

from __future__ import annotations

import functools
import inspect
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.editors import Editor, EditResult, Patch, make_editor
from easyedit_moe.editors.keywords import check_keywords
from easyedit_moe.editors.proposing import named_proposal
from easyedit_moe.errors import HyperParamsError, KeywordError, RequestError, shown
from easyedit_moe.evaluation.answers import AnswerScorer
from easyedit_moe.evaluation.context import check_fit
from easyedit_moe.evaluation.scoring import TargetScore, score_targets
from easyedit_moe.facts.easyedit_requests import (
    HostRequest,
    checked_batches,
    is_nothing,
    prompts_of,
    requests_from_columns,
)
from easyedit_moe.facts.requests import EditRequest, listed_requests
from easyedit_moe.hparams import MoEHyperParams, load_hyperparams
from easyedit_moe.hparams.files import is_yaml
from easyedit_moe.interrupts import uninterrupted
from easyedit_moe.moe.holding import held, intact
from easyedit_moe.moe.loading import load_model
from easyedit_moe.patches.checks import Base
from easyedit_moe.patches.merging import revert_run
from easyedit_moe.patches.runs import continues, continues_tensors
from easyedit_moe.patches.tensors import TensorPatch
from easyedit_moe.patches.weights import WeightPatch

logger = logging.getLogger(__name__)

Results = tuple[list[dict[str, Any]], nn.Module, dict[str, Tensor]]
Texts = str | Sequence[str]


@dataclass(frozen=True)
class Kept:
    """Sequential edits that are in a model.

    Attributes:
        memory: what the method wants to know of them.
        parent: id of the newest one's patch, which the next patch names as the one it was made on.
        patch: the newest one's patch, where patches are kept for `MoEEditor.undo`.
        earlier: the edits before that one.
    """

    memory: Any = None
    parent: str | None = None
    patch: Patch | None = None
    earlier: Kept | None = None


class Scorer(Protocol):
    """What is measured of requests before and after they are edited."""

    def before(self, batch: Sequence[HostRequest]) -> list[Any]:
        """One value per request of the model as it is before the edit."""
        ...

    def measured(self, before: Sequence[Any]) -> None:
        """Told once all of a run's requests were measured before the first edit."""
        ...

    def after(self, number: int, batch: Sequence[HostRequest]) -> list[Any]:
        """One value per request of the edited model; ``number`` is the first one's in the run."""
        ...

    def entry(self, request: HostRequest, before: Any, after: Any) -> dict[str, Any]:
        """One request's result: "pre" and "post"."""
        ...


def _with_columns(run: Callable[..., Any]) -> Callable[..., Any]:
    """EasyEdit's arguments, parallel lists or texts, for a method that takes the list of requests they make."""

    @functools.wraps(run, assigned=("__module__", "__name__", "__qualname__", "__doc__"), updated=())
    def call(
        self: EditCalls,
        prompts: Texts | None = None,
        target_new: Texts | None = None,
        ground_truth: Texts | None = None,
        target_neg: Texts | None = None,
        rephrase_prompts: Texts | None = None,
        locality_inputs: Mapping[str, Mapping[str, Any]] | None = None,
        portability_inputs: Mapping[str, Mapping[str, Any]] | None = None,
        sequential_edit: bool = False,
        verbose: bool = True,
        subject: Texts | None = None,
        requests: Sequence[Mapping[str, Any] | EditRequest] | None = None,
        **options: Any,
    ) -> Any:
        self._check_keywords(run.__name__, options)
        columns: dict[str, Any] = {
            "prompts": prompts, "target_new": target_new, "ground_truth": ground_truth, "target_neg": target_neg,
            "rephrase_prompts": rephrase_prompts, "locality_inputs": locality_inputs,
            "portability_inputs": portability_inputs, "subject": subject,
        }  # fmt: skip
        if requests is None:
            return run(self, requests_from_columns(**columns), sequential_edit, verbose, **options)
        ignored = [
            name for name, value in columns.items() if not (is_nothing(value) or (isinstance(value, str) and not value))
        ]
        if ignored:
            raise KeywordError(
                f"{run.__name__} takes the facts as requests= or as lists, not both; besides requests= there is "
                f"{', '.join(ignored)}."
            )
        return run(self, requests, sequential_edit, verbose, **options)

    del call.__wrapped__  # its signature is the one above
    return call


class EditCalls(ABC):
    """EasyEdit's calls: ``edit``, ``batch_edit``, ``edit_requests``, ``normal_edit`` and ``generate_edit``.

    The loop over requests, the way back and the shape of results are here; a home says what scores them. All requests
    are parsed and checked, once, before the first is edited. If scoring fails after an edit, that edit is taken back.

    Attributes:
        hparams: of the method; changes take effect with the next call.
        model, tok: edited in place.
        kept: the sequential edits in the model; one assignment adds an edit or takes it away.
        editor: does the edits; keeps what was prepared between calls.
    """

    case_id_per_batch = False
    """Whether ``case_id`` starts anew in each batch, as EasyEdit's ``batch_edit`` has it."""

    options: tuple[str, ...] = ()
    """Further keywords of the calls, which `scorer` is given."""

    progress = True
    """Whether editors show progress bars, unless ``verbose=False``."""

    hparams: MoEHyperParams
    model: nn.Module
    tok: PreTrainedTokenizerBase
    kept: Kept
    editor: Editor | None = None

    @property
    def memory(self) -> Any:
        """What the method wants to know of earlier sequential edits."""
        return self.kept.memory

    @property
    def parent(self) -> str | None:
        """Id of the newest sequential edit's patch, which the next one names as the one it was made on."""
        return self.kept.parent

    @abstractmethod
    def scorer(self, **options: Any) -> Scorer:
        """What measures requests; ``options`` are the call's further keywords."""

    @_with_columns
    def edit(
        self, requests: Sequence[Mapping[str, Any] | EditRequest], sequential: bool, verbose: bool, **options: Any
    ) -> Results:
        """One edit after the other; unless ``sequential_edit``, each is reverted bit-exactly before the next.

        Arguments and results are EasyEdit's: metrics per request with "pre" and "post" (``rewrite_acc``,
        ``rephrase_acc``, ``locality`` -> ``<key>_acc``, ``portability`` -> ``<key>_acc``), the model, and the original
        tensors that the last edit changed. A text and a list of one text are the same. ``target_neg`` is carried along
        and unused. ``requests`` may be given instead of lists. Locality and portability may be empty, in whole or
        in a group or for one request: nothing is asked there.

        Raises:
            RequestError: missing subjects where the method uses them, lists of different lengths, or requests that
                can't be used.
            KeywordError: an unknown keyword, or one of EasyEdit's that would be ignored; ``requests`` besides lists.
        """
        return self.edit_requests(requests, sequential, verbose, **options)

    def edit_requests(
        self,
        requests: Sequence[Mapping[str, Any] | EditRequest],
        sequential_edit: bool = False,
        verbose: bool = True,
        test_generation: bool = False,
        **options: Any,
    ) -> Results:
        """As `edit`, with request dicts (EasyEdit's or ROME's) or `EditRequest` values."""
        options["test_generation"] = test_generation
        self._check_keywords("edit_requests", options)
        retention = _asked_retention(sequential_edit, options)
        scorer = self.scorer(**options)
        single = [[request] for request in listed_requests(requests)]
        return self._run(single, sequential_edit, verbose, scorer, measure_first=True, retention=retention)

    @_with_columns
    def batch_edit(
        self, requests: Sequence[Mapping[str, Any] | EditRequest], sequential: bool, verbose: bool, **options: Any
    ) -> Results:
        """As `edit`, ``hparams.batch_size`` requests at a time."""
        size = replace(self.hparams).batch_size  # checked anew, since fields can be set after reading
        listed = listed_requests(requests)
        batches = [listed[start : start + size] for start in range(0, len(listed), size)]
        retention = _asked_retention(sequential, options)
        return self._run(batches, sequential, verbose, self.scorer(**options), retention=retention)

    @_with_columns
    def generate_edit(
        self, requests: Sequence[Mapping[str, Any] | EditRequest], sequential: bool, verbose: bool, **options: Any
    ) -> Results:
        """As `edit`, but "pre" and "post" hold answers by free generation instead of scores."""
        scorer = AnswerScorer(self.model, self.tok)
        single = [[request] for request in listed_requests(requests)]
        return self._run(single, sequential, verbose, scorer, measure_first=True)

    def normal_edit(
        self, prompts: Texts, target_new: Texts, sequential_edit: bool = False, subject: Texts | None = None
    ) -> tuple[None, nn.Module, dict[str, Tensor]]:
        """All requests as one batch, without scores: None, the model and the original tensors.

        The weights are put back unless ``sequential_edit``.

        Raises:
            RequestError: no subject where the method uses it, or requests that can't be used.
        """
        requests = requests_from_columns(prompts, target_new, None, None, None, None, None, subject)
        (batch,) = checked_batches([requests])
        with held(self.model), self._scope():
            _, weights, _ = self._edited(batch, sequential_edit, with_weights=True)
        return None, self.model, weights

    def _check_keywords(self, call: str, given: Mapping[str, Any]) -> None:
        """Refuse what this call would ignore: `generate_edit` has no scores, `batch_edit` none of all requests."""
        without = {"generate_edit": self.options, "batch_edit": ("pre_file",)}.get(call, ())
        taken = [name for name in self.options if name not in without]
        check_keywords(call, given, taken, [*inspect.signature(getattr(self, call)).parameters])

    def _run(
        self,
        batches: Sequence[Sequence[Mapping[str, Any] | EditRequest]],
        sequential: bool,
        verbose: bool,
        scorer: Scorer,
        measure_first: bool = False,
        retention: bool = False,
    ) -> Results:
        checked = checked_batches(batches)
        editor = self._current_editor()
        self._check_all([request for batch in checked for request in batch])
        metrics: list[dict[str, Any]] = []
        weights: dict[str, Tensor] = {}
        kept = _Retained(scorer)
        with held(self.model), self._scope(), _bars_of(editor, editor.progress and verbose):
            before = [scorer.before(batch) for batch in checked] if measure_first else []
            if measure_first:
                scorer.measured([value for values in before for value in values])
            for number, batch in enumerate(checked):
                old = before[number] if measure_first else scorer.before(batch)
                scored = partial(scorer.after, len(metrics), batch)
                seconds, weights, new = self._edited(batch, sequential, number == len(checked) - 1, scored)
                for i, (request, was, now) in enumerate(zip(batch, old, new, strict=True)):
                    case_id = i if self.case_id_per_batch and not measure_first else len(metrics)
                    entry = {"case_id": case_id, "requested_rewrite": request.record, "time": seconds}
                    metrics.append({**entry, **scorer.entry(request, was, now)})
                    if verbose:
                        self._report(metrics[-1])
                if retention:
                    kept.batch_done(batch, old, metrics)
        if measure_first:
            self._finished(metrics)
        return metrics, self.model, weights

    def _check_all(self, requests: Sequence[HostRequest]) -> None:
        """Refuse, before the first edit, what would be refused at a later one or when it is scored."""
        self._current_editor().check_requests(self.model, self.tok, [request.fact for request in requests])
        asked = [(prompt, answer) for request in requests for _, prompt, answer in prompts_of(request.record)]
        check_fit(self.model, self.tok, asked, self.hparams.chat)

    def _edited(
        self,
        batch: Sequence[HostRequest],
        sequential: bool,
        with_weights: bool,
        scored: Callable[[], list[Any]] = list,
    ) -> tuple[float, dict[str, Tensor], list[Any]]:
        """Seconds of one edit, the original tensors if they are asked for, and what ``scored`` finds.

        Afterwards the edit is in ``kept``, or is undone: where it is not ``sequential``, or anything raised.
        """
        before = self.kept
        with intact(self.model, kept=lambda: self.kept is not before):
            start = time.perf_counter()
            result = self._edit(batch)
            seconds = time.perf_counter() - start
            weights = result.patch.weights_copy(self.model) if with_weights else {}
            found = scored()
            if sequential:
                self.kept = self._with(result)
            else:
                result.patch.revert(self.model)
        return seconds, weights, found

    def _edit(self, batch: Sequence[HostRequest]) -> EditResult:
        kept = self.kept
        result = self._current_editor().edit(self.model, self.tok, [request.fact for request in batch], kept.memory)
        result.patch.parent = kept.parent
        return result

    def _current_editor(self) -> Editor:
        settings = replace(self.hparams)  # checked anew, since fields can be set after reading
        if self.editor is None or not _same_settings(self.editor.hparams, settings):
            self.editor = make_editor(settings, self.progress)
        return self.editor

    def _with(self, result: EditResult) -> Kept:
        """What is kept once this sequential edit is."""
        return Kept(result.memory, result.patch.id)

    def _scope(self) -> AbstractContextManager[Any]:
        """What a run needs around it."""
        return nullcontext()

    def _report(self, entry: Mapping[str, Any]) -> None:
        rewrite = entry["requested_rewrite"]
        logger.info("%s -> %s: %s", rewrite["prompt"], rewrite["target_new"], entry["post"])

    def _finished(self, metrics: list[dict[str, Any]]) -> None:
        """Called with all results of a run over single edits."""
        logger.info("%d requests were edited one by one.", len(metrics))


def _asked_retention(sequential: bool, options: dict[str, Any]) -> bool:
    """Whether ``retention`` is among the options, which lose it.

    Raises:
        KeywordError: it is, but each edit is taken back before the next.
    """
    asked = bool(options.pop("retention", False))
    if asked and not sequential:
        raise KeywordError("retention=True needs sequential_edit=True: else each edit is reverted before the next.")
    return asked


class _Retained:
    """Scores earlier requests again after each later batch."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.batches: list[tuple[Sequence[HostRequest], Sequence[Any]]] = []

    def batch_done(self, batch: Sequence[HostRequest], before: Sequence[Any], metrics: list[dict[str, Any]]) -> None:
        """``metrics`` has an entry for each request up to this batch, which gets what holds of it now."""
        number = 0
        for earlier, was in self.batches:
            now = self.scorer.after(number, earlier)
            for entry, request, old, new in zip(metrics[number:], earlier, was, now, strict=False):
                post = self.scorer.entry(request, old, new)["post"]
                entry["after_batches"].append(post)
                entry["after_all"] = post
            number += len(earlier)
        for entry in metrics[number:]:
            entry["after_batches"], entry["after_all"] = [], entry["post"]
        self.batches.append((batch, before))


@contextmanager
def _bars_of(editor: Editor, shown: bool) -> Iterator[None]:
    before, editor.progress = editor.progress, shown
    try:
        yield
    finally:
        editor.progress = before


def _same_settings(one: Any, other: MoEHyperParams) -> bool:
    """Whether two hyper-parameters edit alike: the batch size is this module's affair."""
    return type(one) is type(other) and replace(one, batch_size=1) == replace(other, batch_size=1)


class MoEEditor(EditCalls):
    """Edits a model by one method and reports EasyEdit's metrics (teacher-forced token accuracies), without EasyEdit.

    ``undo()`` reverts the newest of its `patches` bit-exactly.

    `edit`, `edit_requests` and `batch_edit` take ``retention=True`` with ``sequential_edit=True``: each request is
    scored not only right after its own batch ("post"), but again after every later one ("after_batches", a list), and
    "after_all" has its scores after the last.
    """

    options = ("retention",)

    def __init__(self, hparams: MoEHyperParams, model: nn.Module, tok: PreTrainedTokenizerBase) -> None:
        self.hparams, self.model, self.tok = _checked_parts(hparams, model, tok)
        self.editor = make_editor(replace(hparams))
        self.kept = Kept()

    @property
    def patches(self) -> list[Patch]:
        """Those that are applied and not undone, oldest first."""
        found, kept = [], self.kept
        while kept.patch is not None:
            found.append(kept.patch)
            kept = kept.earlier or Kept()
        return found[::-1]

    @classmethod
    def from_hparams(
        cls,
        hparams: MoEHyperParams | str | Path,
        model: nn.Module | None = None,
        tok: PreTrainedTokenizerBase | None = None,
        device_map: Any = None,
    ) -> MoEEditor:
        """An editor for hparams (or a YAML file's path); loads model and tokenizer unless both are given.

        Where no YAML is called that, "<METHOD>/<hub name or folder>" means what is chosen for the model from its config
        (see `easyedit_moe.editors.proposing`).

        Raises:
            HyperParamsError, DataError: unusable hparams or checkpoint. RequestError: only one of model and tok.
            LayoutError, DenseModelError: hparams are to be chosen for a model without experts that can be edited.
        """
        if isinstance(hparams, (str, Path)):
            hparams = _read_or_chosen(hparams)
        _check_hparams(hparams)
        if model is None and tok is None:
            model, tok = load_model(
                hparams.model_name,
                hparams.dtype,
                hparams.device,
                hparams.model_parallel,
                device_map,
                hparams.trust_remote_code,
            )
        if model is None or tok is None:
            raise RequestError("Pass model and tok together, or neither.")
        return cls(hparams, model, tok)

    def scorer(self, **options: Any) -> Scorer:
        """Token accuracies by this package's own forwards; all prompts of a batch at once."""
        return TokenScorer(self.model, self.tok, self.hparams.chat)

    def undo(self, count: int = 1, base: Base | None = None) -> None:
        """Revert the newest edits that are still in the model, bit-exactly; many at once are no slower than one.

        Args:
            count: how many.
            base: the unedited model or its weights (see `WeightPatch.revert`), for edits made with
                ``keep_originals: false``.

        Raises:
            PatchError: the weights were changed by something else since, or there are no originals and no base.
            RequestError: there is nothing to undo, or less than that.
        """
        with held(self.model):
            patches = self.patches
            if not 1 <= count <= len(patches):
                raise RequestError(
                    f"There are {len(patches)} edits to undo; found count = {count}."
                    if patches
                    else "There is no edit to undo."
                )
            run = [patch for patch in patches[-count:] if isinstance(patch, WeightPatch)]
            if len(run) == count:
                with uninterrupted():
                    revert_run(run, self.model, base)
                    for _ in run:
                        self.kept = self.kept.earlier or Kept()
                return
            for patch in reversed(patches[-count:]):
                with uninterrupted():
                    patch.revert(self.model)
                    self.kept = self.kept.earlier or Kept()

    def _with(self, result: EditResult) -> Kept:
        if isinstance(result.patch, WeightPatch):
            last = self.kept.patch
            keep = getattr(self.hparams, "keep_originals", True)
            continues(result.patch, last if isinstance(last, WeightPatch) else None, keep)
        if isinstance(result.patch, TensorPatch):
            continues_tensors(result.patch, [patch for patch in self.patches if isinstance(patch, TensorPatch)])
        return replace(super()._with(result), patch=result.patch, earlier=self.kept)


class TokenScorer:
    """EasyEdit's metrics without EasyEdit: the share of a target's tokens that are the model's own first choice.

    Locality is the share of predicted tokens that are the same before and after the edit.
    """

    def __init__(self, model: nn.Module, tok: PreTrainedTokenizerBase, chat: bool = False) -> None:
        self.model, self.tok, self.chat = model, tok, chat

    def before(self, batch: Sequence[HostRequest]) -> list[Any]:
        """Scores of every prompt of every request, keyed by its place in the result."""
        places: list[tuple[int, tuple[str, ...]]] = []
        pairs: list[tuple[str, str]] = []
        for i, request in enumerate(batch):
            for place, prompt, target in prompts_of(request.record):
                places.append((i, place))
                pairs.append((prompt, target))
        found: list[Any] = [{} for _ in batch]
        for (i, place), score in zip(places, score_targets(self.model, self.tok, pairs, chat=self.chat), strict=True):
            found[i].setdefault(place, []).append(score)
        return found

    def measured(self, before: Sequence[Any]) -> None:
        """Nothing more is kept of the scores before the edits."""

    def after(self, number: int, batch: Sequence[HostRequest]) -> list[Any]:
        """As `before`, of the edited model."""
        return self.before(batch)

    def entry(self, request: HostRequest, before: Any, after: Any) -> dict[str, Any]:
        """EasyEdit's sections of one request."""
        entry: dict[str, Any] = {}
        for phase, found in (("pre", before), ("post", after)):
            section: dict[str, Any] = {"locality": {}, "portability": {}}
            for place, scores in found.items():
                accuracies = [score.token_accuracy for score in scores]
                if place[0] in ("rewrite", "rephrase"):
                    section[f"{place[0]}_acc"] = accuracies
                elif place[0] == "portability":
                    section["portability"][f"{place[1]}_acc"] = accuracies
                elif phase == "post":
                    section["locality"][f"{place[1]}_acc"] = _unchanged(before[place], scores)
            entry[phase] = section
        return entry


def _unchanged(before: Sequence[TargetScore], after: Sequence[TargetScore]) -> list[float]:
    """Share of predicted tokens that are the same before and after, which is what EasyEdit calls locality."""
    return [
        sum(a == b for a, b in zip(x.predicted, y.predicted, strict=True)) / len(x.predicted)
        for x, y in zip(before, after, strict=True)
    ]


def _check_hparams(hparams: Any) -> None:
    if not isinstance(hparams, MoEHyperParams):
        raise HyperParamsError(
            f"hparams must be hyper-parameters of ours or the path of a YAML file; found {shown(hparams)} "
            f"({type(hparams).__name__})."
        )


def _checked_parts(hparams: Any, model: Any, tok: Any) -> tuple[MoEHyperParams, nn.Module, PreTrainedTokenizerBase]:
    _check_hparams(hparams)
    if not isinstance(model, nn.Module) or not callable(tok) or isinstance(tok, nn.Module):
        raise RequestError(
            f"An editor needs a model and its tokenizer; found {type(model).__name__} and {type(tok).__name__}. "
            "MoEEditor.from_hparams(hparams) loads both."
        )
    return hparams, model, tok


def _read_or_chosen(path: str | Path) -> MoEHyperParams:
    """The YAML's hyper-parameters, or those that are chosen for the model that is named instead of one."""
    try:
        return load_hyperparams(path)
    except HyperParamsError:
        if is_yaml(path):
            raise
        found = named_proposal(path)
        if found is None:
            raise
    logger.warning("No hparams are called %s, so they are chosen from the config of %s.", path, found.model)
    return found.hparams()
