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


def context_length(model: nn.Module) -> int | None:
    """Tokens that the model takes at once, as its configuration says; None where it says nothing."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
