"""A model's embeddings, which transformers finds by methods that PyTorch's types do not know of."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from easyedit_moe.errors import LayoutError


def input_embeddings(model: nn.Module) -> nn.Embedding:
    """The token embedding, from ids to hidden states.

    Raises:
        LayoutError: neither the model nor a part of it has one.
    """
    return cast(nn.Embedding, _own_or_nested(model, "get_input_embeddings"))


def output_embeddings(model: nn.Module) -> nn.Module:
    """The output embedding, from hidden states to logits; where a wrapper has none, that of the text model in it.

    Raises:
        LayoutError: neither the model nor a part of it has one.
    """
    return _own_or_nested(model, "get_output_embeddings")


def _own_or_nested(model: nn.Module, method: str) -> nn.Module:
    """What the model's method returns, or, where that is nothing, what that of the first module inside returns."""
    for module in model.modules():
        found: Any = getattr(module, method, None)
        try:
            embedding = found() if callable(found) else None
        except NotImplementedError:  # a wrapper that leaves the answer to its parts
            embedding = None
        if isinstance(embedding, nn.Module):
            return embedding
    raise LayoutError(
        f"{type(model).__name__}.{method}() finds nothing, nor does that of any module inside. Load the model with a "
        "language model's head (AutoModelForCausalLM)."
    )
