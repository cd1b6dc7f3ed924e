"""What a decoder layer returns, and how it is put back: the one place that knows.

A layer returns its hidden states, alone or first in a tuple with more (attention weights, indices that later layers
share, states of a router). Hidden states are ``[B, S, d]``, or ``[B, S, n, d]`` where hyper-connections keep n residual
streams; those are read as one vector of ``n d`` numbers per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from easyedit_moe.errors import LayoutError


@dataclass(frozen=True)
class LayerOutput:
    """One layer's output, taken apart.

    Attributes:
        hidden: ``[B, S, D]``; D is d, or n d where the layer keeps n streams.
        streams: ``(n, d)`` where it does, else empty.
        more: what came with the hidden states in a tuple; None where they came alone.
    """

    hidden: Tensor
    streams: tuple[int, ...] = ()
    more: tuple[Any, ...] | None = None

    @staticmethod
    def of(output: Any) -> LayerOutput:
        """Take an output apart.

        Raises:
            LayoutError: neither a tensor nor a sequence that starts with one.
        """
        if isinstance(output, Tensor):
            first, more = output, None
        elif isinstance(output, Sequence) and len(output) and isinstance(output[0], Tensor):
            first, more = output[0], tuple(output[1:])
        else:
            raise LayoutError(
                f"A decoder layer returned {type(output).__name__}; expected hidden states, or a tuple that starts "
                "with them. Please report the model's class."
            )
        if first.dim() == 4:
            return LayerOutput(first.flatten(2), tuple(first.shape[2:]), more)
        return LayerOutput(first, (), more)

    def put_back(self, hidden: Tensor) -> Any:
        """What the layer would have returned with other hidden states ``[B, S, D]``."""
        shaped = hidden.reshape(*hidden.shape[:2], *self.streams) if self.streams else hidden
        return shaped if self.more is None else (shaped, *self.more)

    def pass_on(self, hidden_states: Tensor) -> Any:
        """What a layer would return that hands its input ``hidden_states`` on as it is, whatever its shape."""
        return hidden_states if self.more is None else (hidden_states, *self.more)

    @property
    def has_more(self) -> bool:
        """Whether tensors came with the hidden states."""
        return any(isinstance(value, Tensor) for value in self.more or ())

    def select(self, rows: Tensor) -> LayerOutput:
        """Only these of the B sequences."""
        kept = self.more and tuple(v[rows.to(v.device)] if isinstance(v, Tensor) else v for v in self.more)
        return LayerOutput(self.hidden[rows.to(self.hidden.device)], self.streams, kept)


def layer_output(output: Any) -> Tensor:
    """The hidden states ``[B, S, D]`` in what a layer or a block returned; see `LayerOutput`."""
    return LayerOutput.of(output).hidden


def replace_layer_output(output: Any, hidden: Tensor) -> Any:
    """What the layer or the block returned, with other hidden states."""
    return LayerOutput.of(output).put_back(hidden)
