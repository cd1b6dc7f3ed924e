"""What training needs of memory: trainable values, the optimiser's state, activations and originals, from shapes alone.

As in `easyedit_moe.editors.planner`, whose numbers for activations these are, sums are over all devices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from easyedit_moe.editors.planner import PROMPT_TOKENS, TARGET_TOKENS, MemoryPlan, Shapes, Stage, Workload, activations
from easyedit_moe.hparams import TrainingHyperParams


@dataclass(frozen=True)
class Trained:
    """What is trained.

    Attributes:
        numbers: trainable numbers.
        itemsize: bytes of one where it lies in the model, or in an adapter beside it.
        written: bytes of the model's parameters that are changed in the end, whose originals are kept.
        on_the_fly: bytes that each forward makes of adapters and keeps for the gradient.
        start: copies in float32 of the values before training, for a bound on their change.
    """

    numbers: int
    itemsize: int
    written: int
    on_the_fly: int = 0
    start: int = 0

    @staticmethod
    def of(parameters: Iterable[nn.Parameter]) -> Trained:
        """Parameters of the model that are trained as they are."""
        listed = list(parameters)
        held = sum(p.numel() * p.element_size() for p in listed)
        return Trained(sum(p.numel() for p in listed), max((p.element_size() for p in listed), default=4), held)


def optimiser_bytes(trained: Trained) -> int:
    """Float32 masters (where the weights are no float32), gradients in both dtypes, and Adam's two moments."""
    masters = 0 if trained.itemsize == 4 else 4 + trained.itemsize
    return trained.numbers * (masters + 4 + 8) + 4 * trained.start


def train_stage(shapes: Shapes, trained: Trained, sequences: int, length: int, lowest: int, copies: int = 2) -> Stage:
    """Steps of Adam: the optimiser, and activations kept from layer ``lowest`` up for the gradient, with the logits.

    Args:
        shapes: of the model.
        trained: what is trained.
        sequences: token sequences in one step.
        length: tokens of each.
        lowest: lowest layer with something trained.
        copies: tensors of logits in float32 at once.
    """
    tokens = sequences * length
    kept = activations(shapes, tokens) * (shapes.num_layers - lowest)
    logits = tokens * shapes.vocabulary * (copies * 4 + shapes.itemsize)
    note = f"{trained.numbers:,} trainable numbers, {optimiser_bytes(trained) / 1e9:.3f} GB with optimiser state"
    return Stage("train", 0, optimiser_bytes(trained) + trained.on_the_fly + kept + logits, note)


def originals_stage(trained: Trained, itemsize: int) -> Stage:
    """Originals and new values of what is written, in the model's dtype, and one copy in float32."""
    numbers = trained.written // max(itemsize, 1)
    return Stage("write", 2 * trained.written, 8 * numbers, "originals for an exact revert; the patch's values")


def plan_training(
    shapes: Shapes,
    hparams: TrainingHyperParams,
    trained: Trained,
    workload: Workload,
) -> MemoryPlan:
    """The plan of a method that minimises the NLL of new answers.

    ``train_batch_size`` is part of the method, so a budget changes nothing: it is only compared.

    Raises:
        HyperParamsError: a budget that is not positive.
    """
    edits = workload.edits_of(hparams)
    facts = 1 if hparams.order == "depth_first" else min(hparams.train_batch_size, edits)
    sequences = facts * (len(hparams.context_prefixes) + 1)
    stages = (
        train_stage(shapes, trained, sequences, PROMPT_TOKENS + TARGET_TOKENS, hparams.layers[0]),
        originals_stage(trained, shapes.itemsize),
    )
    settings = {"train_batch_size": facts}
    return MemoryPlan(shapes, tuple(hparams.layers), edits, stages, settings, workload.checked_budget())
