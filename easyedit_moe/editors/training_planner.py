"""What training needs of memory: trainable values, the optimiser's state, activations and originals, from shapes alone.

As in `easyedit_moe.editors.planner`, sums are over all devices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from easyedit_moe.editors.planner import MemoryPlan, Workload
from easyedit_moe.editors.stages import Stage
from easyedit_moe.hparams import TrainingHyperParams
from easyedit_moe.moe.activations import inference, kept_for_gradient, passing, scored
from easyedit_moe.moe.shapes import Lengths, Shapes


@dataclass(frozen=True)
class Trained:
    """What is trained.

    Attributes:
        numbers: trainable numbers.
        itemsize: bytes of one where it lies in the model, or in an adapter beside it.
        written: bytes of the model's parameters that are changed in the end, whose originals are kept.
        largest: numbers of the largest of these parameters.
        on_the_fly: numbers of parameters whose sum with an adapter each forward makes and keeps for the gradient.
        beside: numbers of parameters that get an adapter's product in the end, made beside them in float32.
        state: bytes per trainable number beside Adam's: of an adapter itself, and what its method notes of it.
        start: copies in float32 of the values before training, for a bound on their change.
    """

    numbers: int
    itemsize: int
    written: int
    largest: int = 0
    on_the_fly: int = 0
    beside: int = 0
    state: int = 0
    start: int = 0

    @staticmethod
    def of(parameters: Iterable[nn.Parameter]) -> Trained:
        """Parameters of the model that are trained as they are."""
        listed = list(parameters)
        held, sizes = sum(p.numel() * p.element_size() for p in listed), [p.numel() for p in listed]
        itemsize = max((p.element_size() for p in listed), default=4)
        return Trained(sum(sizes), itemsize, held, max(sizes, default=0))


def optimiser_bytes(trained: Trained) -> int:
    """Float32 masters (where the weights are no float32), gradients in both dtypes, and Adam's two moments."""
    masters = 0 if trained.itemsize == 4 else 4 + trained.itemsize
    return trained.numbers * (masters + 4 + 8) + 4 * trained.start


def held_between_steps(trained: Trained) -> int:
    """Bytes that stay from step to step: masters where the weights are no float32, Adam's moments, values before."""
    masters = 0 if trained.itemsize == 4 else 4
    return trained.numbers * (masters + 8 + trained.state) + 4 * trained.start


def step_bytes(trained: Trained, device: str) -> int:
    """Bytes of an update beyond what stays: gradients, and Adam's temporaries; on a GPU those of all parameters."""
    own = min(trained.largest, trained.numbers) if device == "cpu" else trained.numbers
    gradients = trained.numbers * 4 + (0 if trained.itemsize == 4 else trained.itemsize * own)
    return gradients + 8 * own


def train_stage(
    shapes: Shapes, trained: Trained, sequences: int, lengths: Lengths, layers: list[int], device: str = "cpu"
) -> Stage:
    """Steps of Adam: the optimiser, and activations kept from the lowest trained layer up, with the logits.

    Args:
        shapes: of the model.
        trained: what is trained.
        sequences: token sequences in one step.
        lengths: of their prompts and targets.
        layers: those with something trained, whose experts' inputs are kept, too.
        device: "cpu" or "cuda".
    """
    tokens, above = sequences * lengths.whole, shapes.num_layers - 1 - layers[0]
    kept = above * kept_for_gradient(shapes, tokens, tokens, tokens)
    experts = tokens * shapes.active * shapes.itemsize
    kept += experts * shapes.d_hidden * len(layers)
    logits = scored(shapes, sequences * lengths.target)
    summed = trained.on_the_fly * shapes.itemsize
    forward = kept + summed + max(passing(shapes, tokens), logits)
    held = held_between_steps(trained)
    final = trained.numbers * trained.state + 8 * trained.beside + (4 * trained.largest if shapes.itemsize < 4 else 0)
    values = 4 * trained.beside if trained.beside else 0 if trained.itemsize == 4 else 4 * trained.numbers
    working = max(inference(shapes, tokens), held + max(forward, step_bytes(trained, device)), final)
    note = f"{trained.numbers:,} trainable numbers, {optimiser_bytes(trained) / 1e9:.3f} GB with optimiser state"
    return Stage("train", values, max(0, working - values), note)


def originals_stage(trained: Trained) -> Stage:
    """Originals of what is written, in the model's dtype."""
    return Stage("originals", trained.written, 0, "for an exact revert")


def values_stage(trained: Trained, itemsize: int) -> Stage:
    """New values of what is written, in the model's dtype, and what one parameter's write needs."""
    one = trained.largest * (itemsize + 3 if itemsize == 4 else 4 * 3 + itemsize)
    return Stage("write", trained.written, max(0, one - trained.written), "the patch's values")


def answers_stage(shapes: Shapes, sequences: int, lengths: Lengths) -> Stage:
    """How the model answers the facts, without a gradient: before and after."""
    working = max(inference(shapes, sequences * lengths.whole), scored(shapes, sequences * lengths.target))
    return Stage("answers", 0, working, "the facts as the model answers them")


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
    device, lengths = workload.device_of(hparams), workload.lengths
    train = train_stage(shapes, trained, sequences, lengths, hparams.layers, device)
    # Adapters leave the weights alone until they are trained.
    first, then = (train, originals_stage(trained)) if trained.beside else (originals_stage(trained), train)
    stages = (first, then, values_stage(trained, shapes.itemsize), answers_stage(shapes, sequences, lengths))
    settings = {"train_batch_size": facts}
    return MemoryPlan(shapes, tuple(hparams.layers), edits, stages, settings, workload.checked_budget())
