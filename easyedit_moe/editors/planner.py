"""What an edit will need of memory, from shapes alone: before weights are loaded, before anything runs.

Editing arithmetic is counted tensor by tensor (its peak is measured against this plan by the tests and by
``python -m benchmarks growth``); the activations of the model's own forwards are an estimate. All is summed over
devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from easyedit_moe.editors.lasting_plan import (
    after_stages,
    before_stages,
    directions_stages,
    held_stages,
    moments_stages,
    written_rank,
)
from easyedit_moe.editors.stages import (
    PREPARED,
    Stage,
    basis_stage,
    capture_stage,
    metric_stage,
    solve_stage,
    statistics_stage,
    targets_stage,
    write_stage,
)
from easyedit_moe.errors import HyperParamsError
from easyedit_moe.hparams import MoTEHyperParams, SolverHyperParams
from easyedit_moe.moe.shapes import USUAL, Lengths, Shapes
from easyedit_moe.targets.memory import USUAL_SEQUENCES


@dataclass(frozen=True)
class Workload:
    """What is planned for.

    Attributes:
        edits: requests in the batch; None: the ``batch_size`` of the hparams.
        earlier_edits: edits of earlier batches that are remembered, for methods that do.
        budget: bytes, all devices together, to fit sizes to that results do not depend on; None: no bound.
        device: kind of device, "cpu" or "cuda"; None: that of the hparams.
        lengths: of prompts and targets.
    """

    edits: int | None = None
    earlier_edits: int = 0
    budget: int | None = None
    device: str | None = None
    lengths: Lengths = USUAL

    def edits_of(self, hparams: Any) -> int:
        """Requests in the batch."""
        return int(hparams.batch_size if self.edits is None else self.edits)

    def device_of(self, hparams: Any) -> str:
        """Kind of device; a number in the hparams is a GPU's."""
        device = hparams.device if self.device is None else self.device
        return "cuda" if isinstance(device, int) else str(device).partition(":")[0]

    def checked_budget(self) -> int | None:
        """The budget.

        Raises:
            HyperParamsError: it is not positive.
        """
        if self.budget is not None and self.budget <= 0:
            raise HyperParamsError(f"The memory budget must be greater than 0; found {self.budget}.")
        return self.budget


@dataclass(frozen=True)
class MemoryPlan:
    """Stages in the order in which they run, and the chunk sizes they were planned with."""

    shapes: Shapes
    layers: tuple[int, ...]
    edits: int
    stages: tuple[Stage, ...]
    settings: dict[str, int]
    budget: int | None

    def peaks(self) -> list[int]:
        """Per stage, bytes at its peak: the model, what earlier stages kept, and its own."""
        held, used_up, out = self.shapes.parameters, 0, []
        for stage in self.stages:
            used_up = used_up if stage.name in PREPARED else 0
            out.append(held + used_up + stage.kept + stage.working)
            used_up += stage.kept if stage.used_up else 0
            held += 0 if stage.used_up else stage.kept
        return out

    @property
    def peak(self) -> int:
        """Bytes at the peak of the whole edit."""
        return max(self.peaks())

    @property
    def editing_peak(self) -> int:
        """Bytes at the peak beyond the model and what was prepared before (statistics, metric and basis)."""
        held, peak = 0, 0
        for stage in self.stages:
            if stage.name not in PREPARED:
                peak = max(peak, held + stage.kept + stage.working)
                held += stage.kept
        return peak

    @property
    def fits(self) -> bool:
        """Whether the peak stays within the budget; True without one."""
        return self.budget is None or self.peak <= self.budget

    def summary(self) -> str:
        """One line for a log."""
        stages = ", ".join(f"{s.name} {peak / 1e9:.3f}" for s, peak in zip(self.stages, self.peaks(), strict=True))
        return f"planned memory in GB: model {self.shapes.parameters / 1e9:.3f}; peak of each stage: {stages}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "peaks": self.peaks(), "peak": self.peak, "fits": self.fits}


def plan(
    shapes: Shapes,
    hparams: SolverHyperParams,
    edits: int | None = None,
    earlier_edits: int = 0,
    lengths: Lengths = USUAL,
    budget: int | None = None,
    device: str = "cpu",
    batches: int = 1,
) -> MemoryPlan:
    """The memory plan of one batch of edits, or of the last of several whose patches are kept.

    Sizes that results do not depend on (``capture_batch_size`` and ``target_batch_size``) are halved from their
    defaults until their stage fits ``budget``; see `MemoryPlan.settings`. Where ``target_batch_size`` is None,
    256 is planned for, which a search on a GPU exceeds only within half of what is free then.

    Args:
        shapes: of the model.
        hparams: of the method.
        edits: requests in the batch, by default ``hparams.batch_size``.
        earlier_edits: edits remembered from earlier batches; counted with ``remember_edits`` only.
        lengths: of prompts and targets.
        budget: bytes, all devices together.
        device: "cpu" or "cuda", on which the size of a tile depends.
        batches: batches of this size whose patches are joined and kept: they share their originals.

    Raises:
        HyperParamsError: a budget that is not positive, or ranks out of range.
    """
    Workload(budget=budget).checked_budget()
    edits = hparams.batch_size if edits is None else edits
    fitted = _Fitted(budget, shapes.parameters)
    contexts = len(hparams.context_prefixes) + 1
    again = min(hparams.replay_facts, earlier_edits)
    earlier = (earlier_edits - again) * contexts if hparams.remember_edits else 0
    asked, edits = edits, edits + again
    together = min(edits, getattr(hparams, "edits_per_solve", None) or edits)
    rows = together * contexts + earlier
    fitted.extend(_prepared(shapes, hparams))
    fitted.extend(before_stages(shapes, hparams, earlier_edits, contexts))
    most, captured = hparams.target_batch_size or USUAL_SEQUENCES, hparams.capture_batch_size
    fitted.add(
        lambda n: targets_stage(shapes, hparams.layers[-1], together, contexts, lengths, n), "target_batch_size", most
    )
    fitted.add(
        lambda n: capture_stage(shapes, hparams, edits, contexts, earlier, lengths, n), "capture_batch_size", captured
    )
    solves, rank = -(-edits // together), written_rank(shapes, hparams, together * contexts, earlier_edits)
    tokens = edits * contexts + earlier
    write = write_stage(shapes, hparams, tokens, rows, device, batches, solves, rank)
    fitted.extend(held_stages(shapes, hparams, earlier + (edits - together) * contexts))
    fitted.extend([solve_stage(shapes, hparams, rows, solves), write])
    fitted.extend(after_stages(shapes, hparams, asked, earlier_edits, contexts, tokens))
    return MemoryPlan(shapes, tuple(hparams.edited_layers), asked, tuple(fitted.stages), fitted.settings, budget)


def _prepared(shapes: Shapes, hparams: SolverHyperParams) -> list[Stage]:
    found = moments_stages(shapes, hparams)
    if hparams.needs_statistics:
        found.append(statistics_stage(shapes, hparams, sum(stage.kept for stage in found)))
    if hparams.metric != "identity":
        found.append(metric_stage(shapes, hparams))
    if isinstance(hparams, MoTEHyperParams):
        found.append(basis_stage(shapes, hparams))
    return found + directions_stages(shapes, hparams)


class _Fitted:
    """Stages in turn, each with the largest size, halved from its default, at which it fits the budget."""

    def __init__(self, budget: int | None, held: int) -> None:
        self.budget, self.held = budget, held
        self.stages: list[Stage] = []
        self.settings: dict[str, int] = {}

    def extend(self, stages: Iterable[Stage]) -> None:
        """Stages that have no size."""
        for stage in stages:
            self.stages.append(stage)
            self.held += 0 if stage.used_up else stage.kept

    def add(self, make: Callable[[int], Stage], name: str, size: int) -> None:
        """A stage of a size that goes by a name among the settings."""
        stage = make(size)
        while self.budget is not None and size > 1 and self.held + stage.kept + stage.working > self.budget:
            size //= 2
            stage = make(size)
        self.settings[name] = size
        self.extend([stage])


def with_settings(hparams: SolverHyperParams, memory: MemoryPlan) -> SolverHyperParams:
    """The hparams with the batch sizes of a plan; its results are the same."""
    capture, target = memory.settings["capture_batch_size"], memory.settings["target_batch_size"]
    return replace(hparams, capture_batch_size=capture, target_batch_size=target)
