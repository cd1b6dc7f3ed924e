"""What a search of target vectors needs of memory, from shapes alone, and how many sequences a GPU has room for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from easyedit_moe.errors import LayoutError
from easyedit_moe.moe.activations import inference, kept_for_gradient, passing
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.shapes import Lengths, Shapes, outline_of

USUAL_SEQUENCES = 256
"""Token sequences in one forward where nobody asked for another number and no GPU tells how much it holds."""
SHARE = 0.5
"""Of a GPU's free memory, what a search that nobody bounded may take: arithmetic knows neither attention that holds its
scores nor models whose steps compute whole sequences."""


def search_bytes(shapes: Shapes, layer: int, requests: int, contexts: int, lengths: Lengths) -> int:
    """Bytes at the peak of the search at the output of ``layer`` for requests that share a forward.

    First the layers below compute all prompts, then those above what lies before the fact tokens, of which they keep
    keys and values; a step computes the rest with its gradient, and the logits that are scored. ``contexts`` are those
    of each request; one more sequence is the prompt that the KL term asks.
    """
    rows, scored = requests * (contexts + 1), requests * (contexts * lengths.target + 1)
    above = shapes.num_layers - 1 - layer
    first = inference(shapes, rows * lengths.whole)
    held = rows * (lengths.whole + lengths.behind) * shapes.d_model * shapes.itemsize
    cache = 2 * above * rows * lengths.before * shapes.cached * shapes.itemsize
    tokens, attended = rows * lengths.behind, rows * (lengths.behind + lengths.before)
    routed = requests * (contexts * lengths.behind + 1)
    step = sum(
        kept_for_gradient(shapes, tokens, some, attended) for some in [routed] * (above - 1) + [scored] * (above > 0)
    )
    step += max(passing(shapes, routed), _logits(shapes, requests, scored))
    return max(first, held + cache + step)


def _logits(shapes: Shapes, requests: int, scored: int) -> int:
    """Logits of a step of the search, their log-softmax where targets and where the KL term ask, and its gradient."""
    asked, own = scored - requests, shapes.itemsize if shapes.itemsize < 4 else 0
    forward = scored * (own + 4) + 4 * (asked + 5 * requests)
    backward = 8 * scored + 12 * asked
    return shapes.vocabulary * max(forward, backward)


@dataclass(frozen=True)
class Room:
    """What a search at the output of ``layer`` may take of its GPUs: ``bytes``, for a model of these shapes."""

    shapes: Shapes
    layer: int
    bytes: int

    @staticmethod
    def of(view: MoELayerView, layer: int) -> Room | None:
        """The room beside a model; None where it lies on no GPU, or its config does not tell its sizes.

        Of several GPUs the fullest counts, as if all of the search lay there.
        """
        free = free_bytes({parameter.device for parameter in view.model.parameters()})
        if free is None:
            return None
        try:
            return Room(outline_of(view.model), layer, int(SHARE * free))
        except LayoutError:
            return None

    def holds(self, requests: int, contexts: int, lengths: Lengths) -> bool:
        """Whether these requests may share a forward; see `search_bytes`."""
        return search_bytes(self.shapes, self.layer, requests, contexts, lengths) <= self.bytes


def free_bytes(devices: Iterable[torch.device]) -> int | None:
    """Bytes that the fullest GPU among them has left, those included that torch holds without using; None without one.

    Reading them does not wait for the device.
    """
    free = [
        torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        for device in devices
        if device.type == "cuda"
    ]
    return min(free, default=None)


def enough(sequences: int) -> int:
    """The least of 256, 512, 1024, ... that is no smaller: halving it, chunks differ little as free memory does."""
    size = USUAL_SEQUENCES
    while size < sequences:
        size *= 2
    return size
