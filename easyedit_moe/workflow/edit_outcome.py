"""What an edit of a file of facts did, as a value."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.workflow.measuring import Said
from easyedit_moe.workflow.screening import Refused


@dataclass(frozen=True)
class Change:
    """One prompt before and after the edit.

    Attributes:
        prompt: that was asked.
        wanted: the answer whose probability is told: the new one, or of a neighbour the one to keep.
        before, after: what the model said.
    """

    prompt: str
    wanted: str
    before: Said
    after: Said

    @property
    def changed(self) -> bool:
        """Whether the greedy answer is another, as far as the wanted one is long."""
        return self.before.opening != self.after.opening


@dataclass(frozen=True)
class FactReport:
    """What became of one fact.

    Attributes:
        number: of its record or line in the file.
        request: the edit.
        change: of its own prompt.
        rephrasings, neighbours, portability: of the prompts by which it is judged, where given.
        batch: number of the batch it was edited in, from 0.
        target_nll: negative log-likelihood per token that its target vector, or training, reached; None where the
            method does not say.
        reached: whether the target was then the most likely answer.
        residual_share: share of the wanted residual that was reached at the last layer; None without a target vector.
    """

    number: int
    request: EditRequest
    change: Change
    rephrasings: tuple[Change, ...]
    neighbours: tuple[Change, ...]
    portability: tuple[Change, ...]
    batch: int
    target_nll: float | None
    reached: bool | None
    residual_share: float | None


@dataclass(frozen=True)
class EditReport:
    """What an edit of a file of facts did; `easyedit_moe.workflow.edit_report` writes it down.

    Attributes:
        facts: that were edited, in the file's order.
        refused: that were not, and why.
        unit: what their numbers count: "record" or "line".
        warnings: of each batch.
        seconds: of each stage, all batches together.
        patch_id: of the one patch of all batches.
        files: that were written.
        provenance: what is needed to make the edit again.
        patches: of each batch, in order, applied to the model.
    """

    facts: tuple[FactReport, ...]
    refused: tuple[Refused, ...]
    unit: str
    warnings: tuple[str, ...]
    seconds: dict[str, float]
    patch_id: str
    files: tuple[Path, ...]
    provenance: dict[str, Any]
    patches: tuple[Any, ...] = field(repr=False)

    @property
    def changed(self) -> int:
        """Facts whose greedy answer is another than before, as far as the new target is long."""
        return sum(fact.change.changed for fact in self.facts)

    @property
    def written(self) -> int:
        """Facts whose new target is now what greedy decoding writes."""
        return sum(fact.change.after.first_choice for fact in self.facts)
