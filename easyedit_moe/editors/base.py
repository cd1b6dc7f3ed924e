"""What every editing method offers: prepare, edit a batch, and EasyEdit's ``apply_to_model``."""

from __future__ import annotations

import copy as copying
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import HyperParamsError
from easyedit_moe.hparams import MoEHyperParams, presets


class Patch(Protocol):
    """What an edit did to a model, as a value."""

    reports: list[Any]

    def revert(self, model: nn.Module) -> None:
        """Undo the edit bit-exactly; PatchError where the model was changed by something else since."""

    def restore(self, model: nn.Module) -> None:
        """Put back what was there before, whatever happened since; nothing where nothing was written."""

    def weights_copy(self, model: nn.Module) -> dict[str, Tensor]:
        """Full original tensors by full parameter name, as EasyEdit restores them."""

    def save(self, path: Any) -> None:
        """Write the edit to disk, without pickle."""


@dataclass(frozen=True)
class EditResult:
    """One batch of edits.

    Attributes:
        patch: what was written; it is applied.
        seconds: per stage: statistics, targets, solve, write.
        memory: what the method wants to be given with the next sequential batch.
        targets: target vectors, for methods that have them.
        solver_reports: what the solvers say of their systems.
    """

    patch: Patch
    seconds: dict[str, float]
    memory: Any = None
    targets: list[Any] = field(default_factory=list)
    solver_reports: list[Any] = field(default_factory=list)


class Editor(ABC):
    """Base of all editors; an instance holds hyper-parameters and what is reused between batches."""

    method: ClassVar[str]
    hparams_class: ClassVar[type[MoEHyperParams]]
    edits: ClassVar[str] = "experts"
    """What is changed: "experts", "dense site" or "adapter"."""
    code: ClassVar[str] = "easyedit_moe"
    """Whose code does it."""

    def __init__(self, hparams: MoEHyperParams, progress: bool = True) -> None:
        if not isinstance(hparams, self.hparams_class) or presets.canonical_name(hparams.alg_name) != self.method:
            raise HyperParamsError(
                f"{self.method} needs {self.hparams_class.__name__} with alg_name '{self.method}'; found "
                f"{type(hparams).__name__} with alg_name {getattr(hparams, 'alg_name', None)!r}."
            )
        self.hparams = hparams
        self.progress = progress

    @abstractmethod
    def edit(
        self,
        model: nn.Module,
        tok: PreTrainedTokenizerBase,
        requests: Sequence[Any],
        memory: Any = None,
        targets: Any = None,
    ) -> EditResult:
        """Write one batch of facts into the model, in place: all of it, or, if anything raises, nothing.

        Afterwards hooks, ``requires_grad`` flags and training modes are as before. The returned patch reverts the edit
        bit-exactly.

        Args:
            memory: ``EditResult.memory`` of the batch before, where batches follow each other on one model.
            targets: target vectors of these requests, found at these weights with the same :meth:`target_settings`
                ("z ready"); by default they are found here.

        Raises:
            RequestError: unusable requests, or targets of another number of them.
        """

    def target_settings(self) -> Any:
        """All that target vectors depend on besides model and requests; None for methods without target vectors."""
        return None

    @classmethod
    def apply_to_model(
        cls,
        model: nn.Module,
        tok: PreTrainedTokenizerBase,
        requests: Sequence[Any],
        hparams: MoEHyperParams,
        copy: bool = False,
        return_orig_weights: bool = False,
        keep_original_weight: bool = False,
        **kwargs: Any,
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        """EasyEdit's interface: the edited model, and full original tensors by full parameter name.

        ``copy`` edits a deep copy instead of ``model``. Other keywords that EasyEdit passes are accepted and unused.
        """
        if copy:
            model = copying.deepcopy(model)
        result = cls(hparams).edit(model, tok, requests)
        wanted = return_orig_weights or keep_original_weight
        return model, result.patch.weights_copy(model) if wanted else {}
