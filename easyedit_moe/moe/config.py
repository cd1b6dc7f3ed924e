"""A model's configuration, which PyTorch's types do not know of."""

from __future__ import annotations

from typing import Any

from torch import nn


def model_config(model: nn.Module) -> Any:
    """The whole configuration of a transformers model."""
    return model.config


def text_config(model: nn.Module) -> Any:
    """The part that describes the language model: all of it, unless the model is multimodal."""
    config = model_config(model)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def largest(config: Any, name: str) -> int | None:
    """A whole number of a text model's configuration; where layers have numbers of their own, the largest of them."""
    try:
        values = [getattr(config, name, None)]
    except RuntimeError:  # so transformers refuses to read what differs from layer to layer
        values = [getattr(layer, name, None) for layer in config.per_layer_config]
    return max((value for value in values if isinstance(value, int)), default=None)


def context_length(model: nn.Module) -> int | None:
    """Tokens that the model takes at once, as its configuration says; None where it says nothing."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
