"""What memory plans read of a model, which may lie on the meta device, and of the texts of its edits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from easyedit_moe.errors import DenseModelError, LayoutError
from easyedit_moe.hparams.sites import EXPERTS
from easyedit_moe.moe.config import largest, text_config
from easyedit_moe.moe.layers import MoELayerView

_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k", "moe_top_k")


@dataclass(frozen=True)
class Shapes:
    """All of a model that a plan depends on.

    Attributes:
        experts, active, d_model, d_hidden: E, K, d, h of the edited layers (the largest of each).
        num_layers, vocabulary: of the model.
        parameters: bytes of all its parameters.
        itemsize: bytes per number of the down-projections.
        attention: width of the queries of all heads; 0: d.
        key_values: width of the keys of all heads, and of the values; 0: d.
        repeated: width of the keys as attention reads them, where each group of heads has a copy of its own; 0: that
            of the queries.
    """

    experts: int
    active: int
    d_model: int
    d_hidden: int
    num_layers: int
    vocabulary: int
    parameters: int
    itemsize: int
    attention: int = 0
    key_values: int = 0
    repeated: int = 0

    @property
    def queries(self) -> int:
        """Width of the queries of all heads."""
        return self.attention or self.d_model

    @property
    def read(self) -> int:
        """Width of the keys as attention reads them."""
        return self.repeated or self.queries

    @property
    def cached(self) -> int:
        """Width of the keys of all heads, and of the values, as a cache holds them."""
        return self.key_values or self.d_model


@dataclass(frozen=True)
class Lengths:
    """Tokens that plans assume, unless they are told.

    Attributes:
        prompt: of a prompt, its context prefix included.
        before: of them, those before the fact token, which a search of targets computes once.
        target: of a target.
    """

    prompt: int = 32
    before: int = 16
    target: int = 4

    @property
    def whole(self) -> int:
        """Tokens of a prompt with its target, which is not read to its end."""
        return self.prompt + self.target - 1

    @property
    def behind(self) -> int:
        """Tokens from the fact token on."""
        return self.whole - self.before


USUAL = Lengths()
"""What plans assume."""


def shapes_of(model: nn.Module, layers: list[int] | tuple[int, ...], site: str = EXPERTS) -> Shapes:
    """Shapes of a model, which may lie on the meta device, of what is edited at one site.

    Raises:
        LayerError: layers that can't be edited. LayoutError: experts of unknown layout, or a config that does not say
            how many experts a token uses.
    """
    view = MoELayerView(model, without_weights=True, site=site)
    layouts = [moe.experts.layout for moe in view.require(layers)]
    config = text_config(model)
    named = (getattr(config, name) for name in _EXPERTS_PER_TOKEN if getattr(config, name, None))
    active = next(named, None) if site == EXPERTS else 1
    if active is None:
        raise LayoutError(
            f"The config of {type(model).__name__} names the experts per token by none of "
            f"{', '.join(_EXPERTS_PER_TOKEN)}; please report the model's class."
        )
    return Shapes(
        max(layout.num_experts for layout in layouts),
        int(active),
        max(layout.d_model for layout in layouts),
        max(layout.d_hidden for layout in layouts),
        int(config.num_hidden_layers),
        int(config.vocab_size),
        parameter_bytes(model),
        max(layout.dtype.itemsize for layout in layouts),
        *_attention(config),
    )


def _attention(config: Any) -> tuple[int, int, int]:
    """Widths of queries, of keys and of repeated keys, all heads together; zeros where the config does not say so."""
    heads = largest(config, "num_attention_heads")
    if not heads or heads < 1:
        return 0, 0, 0
    width = largest(config, "head_dim") or config.hidden_size // heads
    groups = largest(config, "num_key_value_heads") or heads
    # One group is read by all heads as it lies.
    return heads * width, groups * width, width if groups == 1 else heads * width


def outline_of(model: nn.Module) -> Shapes:
    """As `shapes_of`, over all MoE layers; a dense model's FFN counts as one expert that every token uses."""
    try:
        return shapes_of(model, sorted(MoELayerView(model, without_weights=True).layers))
    except DenseModelError:
        text = text_config(model)
        width, vocabulary = int(text.hidden_size), int(text.vocab_size)
        hidden = int(getattr(text, "intermediate_size", None) or 4 * width)
        itemsize = next(model.parameters()).element_size()
        return Shapes(
            1, 1, width, hidden, int(text.num_hidden_layers), vocabulary, parameter_bytes(model), itemsize,
            *_attention(text),
        )  # fmt: skip


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters of a model, which may lie on the meta device."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
