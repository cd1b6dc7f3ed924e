"""What every editing method offers: prepare, plan, edit a batch, and EasyEdit's ``apply_to_model``."""

from __future__ import annotations

import copy as copying
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.editors.diagnosis import EditDiagnosis, warnings_of
from easyedit_moe.editors.keywords import check_keywords
from easyedit_moe.editors.planner import MemoryPlan, Workload
from easyedit_moe.editors.remembering import remember, remember_copy, remembered
from easyedit_moe.errors import HyperParamsError, RequestError
from easyedit_moe.evaluation.context import check_fit
from easyedit_moe.facts.requests import EditRequest, check_batch, parse_requests
from easyedit_moe.hparams import MoEHyperParams, hyperparams_class, presets
from easyedit_moe.moe.holding import held, intact
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches.weights import WeightPatch
from easyedit_moe.targets.search import TargetVectors, fact_contexts

APPLY_KEYWORDS = ("model", "tok", "requests", "hparams", "copy", "return_orig_weights", "keep_original_weight")
"""What EasyEdit's ``apply_algo`` is called with."""


class Patch(Protocol):
    """What an edit did to a model, as a value.

    Attributes:
        reports: what each write did.
        parent: ``id`` of the patch that lay on the model when this one was made.
        warnings: what was warned while it was made.
        metadata: provenance, as JSON.
    """

    reports: list[Any]
    parent: str | None
    warnings: list[str]
    metadata: dict[str, Any]

    @property
    def id(self) -> str:
        """16 hexadecimal digits that tell one patch from another."""
        ...

    def revert(self, model: nn.Module) -> None:
        """Undo the edit bit-exactly; PatchError where the model was changed by something else since."""

    def restore(self, model: nn.Module) -> None:
        """Put back what was there before, whatever happened since; nothing where nothing was written."""

    def weights_copy(self, model: nn.Module) -> dict[str, Tensor]:
        """Full original tensors by full parameter name, as EasyEdit restores them."""
        ...

    def save(self, path: Any) -> None:
        """Write the edit to disk, without pickle."""


@dataclass(frozen=True)
class EditResult:
    """One batch of edits.

    Attributes:
        patch: what was written; it is applied.
        seconds: per stage: statistics, targets, solve, write, diagnose.
        memory: what the method wants to be given with the next sequential batch.
        targets: target vectors, for methods that have them.
        solver_reports: what the solvers say of their systems.
        diagnosis: what the edit did to weights, hidden states and facts; None where the editor does not say. The
            patch's metadata holds it, too.
        warnings: what was warned of it; the patch has them, too.
    """

    patch: Patch
    seconds: dict[str, float]
    memory: Any = None
    targets: list[Any] = field(default_factory=list)
    solver_reports: list[Any] = field(default_factory=list)
    diagnosis: EditDiagnosis | None = None
    warnings: list[str] = field(default_factory=list)


def _told(result: EditResult) -> EditResult:
    """The result with its warnings, after they were given; the patch gets them and the diagnosis."""
    if result.diagnosis is None:
        return result
    found = warnings_of(result.diagnosis)
    texts = [str(warning) for warning in found]
    result.patch.metadata |= {"diagnosis": result.diagnosis.to_dict(), "warnings": texts}
    result.patch.warnings[:] = texts
    for warning in found:
        warnings.warn(warning, stacklevel=3)
    return replace(result, warnings=texts)


def provenance(
    hparams: MoEHyperParams, facts: Sequence[EditRequest], targets: Sequence[TargetVectors] = ()
) -> dict[str, Any]:
    """What a patch says about how it was made; of target vectors, which were found together."""
    found = {"hparams": hparams.to_dict(), "requests": [vars(fact) for fact in facts]}
    return found | ({"target_batches": [one for some in targets for one in some.batches]} if targets else {})


def _and_more(count: int) -> str:
    return f", nor have {count} more" if count else ""


class _FromTable:
    """An attribute of editors and their classes that the table of methods knows; an instance may have its own."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type[Editor]) -> str:
        return str(getattr(presets.find_method(owner.method if instance is None else instance.method), self.name))


class Editor(ABC):
    """Base of all editors; an instance holds hyper-parameters and what is reused between batches."""

    method: str
    """The method's name in the table of methods."""
    hparams: Any
    newest: EditResult | None = None
    """The newest edit, from the moment at which it counts; also where an interrupt kept `edit` from returning it."""

    def __init__(self, hparams: MoEHyperParams, progress: bool = True) -> None:
        wanted = hyperparams_class(self.method)
        if not isinstance(hparams, wanted) or presets.canonical_name(hparams.alg_name) != self.method:
            raise HyperParamsError(
                f"{self.method} needs {wanted.__name__} with alg_name '{self.method}'; found "
                f"{type(hparams).__name__} with alg_name {getattr(hparams, 'alg_name', None)!r}."
            )
        self.hparams = hparams
        self.progress = progress

    edits = _FromTable("edits")
    """What is changed: "experts", "shared expert", "dense FFN", "dense site", "layer" or "adapter"."""
    code = _FromTable("code")
    """Whose code does it: "easyedit_moe" or "easyeditor"."""

    def prepare(self, model: nn.Module, tok: PreTrainedTokenizerBase) -> Any:
        """Check that the model has what is edited, and make what depends on the unedited model only.

        It is kept for later batches; `edit` prepares by itself where it was not done. Methods that need nothing only
        check.

        Raises:
            LayerError, LayoutError: the model lacks what is edited, or has it in a form that can't be.
        """
        self.check_layers(self.hparams, MoELayerView(model))

    @classmethod
    def editable_layers(cls, view: MoELayerView) -> list[int]:
        """The layers of a model that the method can edit, increasing."""
        return sorted(view.layers)

    @classmethod
    def check_layers(cls, hparams: Any, view: MoELayerView) -> None:
        """Refuse ``layers`` that the method can't edit.

        Raises:
            LayerError, LayoutError: as `prepare`.
        """
        view.require(hparams.layers)

    def plan(
        self,
        model: nn.Module,
        edits: int | None = None,
        earlier_edits: int = 0,
        budget: int | None = None,
        device: str | None = None,
    ) -> MemoryPlan:
        """What a batch of edits will need of memory; ``model`` may lie on the meta device.

        The arguments are those of `Workload`; raises as `plan_for` does.
        """
        return self.plan_for(self.hparams, model, Workload(edits, earlier_edits, budget, device))

    @classmethod
    @abstractmethod
    def plan_for(cls, hparams: Any, model: nn.Module, workload: Workload) -> MemoryPlan:
        """The memory plan of one batch, from shapes alone.

        Args:
            hparams: of the method.
            model: of which only the shapes are read.
            workload: what is planned for.

        Raises:
            HyperParamsError: a budget that is not positive, or settings out of the model's range. LayerError,
            LayoutError: the model lacks what is edited.
        """

    def edit(
        self,
        model: nn.Module,
        tok: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        memory: Any = None,
        targets: Any = None,
    ) -> EditResult:
        """Write one batch of facts into the model, in place: all of it, or, if anything raises, nothing.

        Afterwards hooks, ``requires_grad`` flags and training modes are as before. The returned patch reverts the edit
        bit-exactly. An interrupt either undoes the edit, or comes after ``newest`` was set to it. Other threads that
        want to edit or score the model wait.

        Args:
            model: edited in place.
            tok: the model's tokenizer.
            requests: parsed; `easyedit_moe.facts.requests.parse_requests` makes them from dicts.
            memory: ``EditResult.memory`` of the batch before, where batches follow each other on one model.
            targets: target vectors of these requests, found at these weights with the same `target_settings`
                ("z ready"); by default they are found here.

        Raises:
            RequestError: no requests, ones that conflict, or one without a subject for a method that uses it; targets
                of another number of them, or for a method without target vectors. Further errors are those of
                `prepare` and of the method's solver or training.

        Warns once for each cause that made the edit do nothing, or less than was wanted (classes under
        `EditingWarning`), naming the setting to change.
        """
        check_batch(requests)
        self.check_requests(model, tok, requests)
        if targets is not None and self.target_settings() is None:
            raise RequestError(f"{self.method} has no target vectors; found {type(targets).__name__}.")
        if targets is not None and len(targets.delta) != len(requests):
            raise RequestError(f"There are {len(targets.delta)} target vectors for {len(requests)} requests.")
        with held(model):
            self._forget()
            with intact(model, kept=lambda: self.newest is not None) as hold:
                hold.undo.append(self._forget)
                result = _told(self.edit_batch(model, tok, list(requests), memory, targets))
                self.newest = result
        return result

    def _forget(self) -> None:
        self.newest = None

    def check_requests(self, model: nn.Module, tok: PreTrainedTokenizerBase, requests: Sequence[EditRequest]) -> None:
        """Refuse what `edit` would refuse of these requests, by what is known without a forward.

        Raises:
            RequestError: as `check_subjects`; a prompt that does not fit the model's context with a context prefix and
                its target; a subject or a chat template that is not found.
        """
        self.check_subjects(requests)
        chat, prefixes = getattr(self.hparams, "chat", False), getattr(self.hparams, "context_prefixes", ())
        place = getattr(self.hparams, "fact_token", "last") if self.needs_subject() else "last"
        texts = [(prefix + one.prompt, one.target_new) for one in requests for prefix in ("", *prefixes)]
        check_fit(model, tok, texts, chat)
        for request in requests:
            fact_contexts(tok, request, prefixes, place, chat)

    def check_subjects(self, requests: Sequence[EditRequest]) -> None:
        """Refuse facts without a subject, unless the method as it is set does not use it.

        Raises:
            RequestError: the method needs the subject, and a fact has none; methods that do without are named.
        """
        missing = [number for number, request in enumerate(requests) if request.subject is None]
        if missing and self.needs_subject():
            others = [method.name for method in presets.own_methods() if not method.needs_subject]
            raise RequestError(
                f"{self.method} needs the subject of each fact, and request {missing[0]} "
                f"({requests[missing[0]].prompt!r}) has none{_and_more(len(missing) - 1)}. Give the part of the prompt "
                f"that it is about as its subject, or use a method that does without: {', '.join(others)}."
            )

    def needs_subject(self) -> bool:
        """Whether every fact must name its subject: as the table of methods has it, unless settings change it."""
        return presets.find_method(self.method).needs_subject

    @abstractmethod
    def edit_batch(
        self, model: nn.Module, tok: PreTrainedTokenizerBase, facts: list[EditRequest], memory: Any, targets: Any
    ) -> EditResult:
        """The method itself: `edit`, whose arguments were checked."""

    def target_settings(self) -> Any:
        """All that target vectors depend on besides model and requests; None for methods without target vectors."""
        return None

    @classmethod
    def apply_to_model(
        cls,
        model: nn.Module,
        tok: PreTrainedTokenizerBase,
        requests: Sequence[Mapping[str, Any] | EditRequest],
        hparams: MoEHyperParams,
        copy: bool = False,
        return_orig_weights: bool = False,
        keep_original_weight: bool = False,
        **kwargs: Any,
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        """EasyEdit's interface: the edited model, and full original tensors by full parameter name.

        ``requests`` are EasyEdit's dicts (or ROME's, or `EditRequest` values). ``copy`` edits a deep copy instead of
        ``model``. With ``remember_edits`` a loop over calls on one model remembers those whose weights are still in it,
        as sequential editing does; those that were put back do not count. Other keywords that EasyEdit passes
        (``train_ds``, ``cache_template``) may have their defaults.

        Raises:
            KeywordError: any other keyword, or one of EasyEdit's that would be ignored. Further errors are `edit`'s.
        """
        check_keywords("apply_to_model", kwargs, (), APPLY_KEYWORDS)
        facts = parse_requests(requests)
        original = model
        keeps = getattr(hparams, "carries", False) or getattr(hparams, "variant", "paper") == "code"
        if copy:
            model = copying.deepcopy(model)
            remember_copy(original, model)
        with intact(model):
            result = cls(hparams).edit(model, tok, facts, remembered(model, hparams) if keeps else None)
            weights = result.patch.weights_copy(model) if return_orig_weights or keep_original_weight else {}
            if keeps and isinstance(result.patch, WeightPatch):
                remember(model, hparams, result.memory, result.patch)
        return model, weights
