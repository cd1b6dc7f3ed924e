"""A model's embeddings, which transformers finds by methods that PyTorch's types do not know of."""

from __future__ import annotations

from typing import Any

from torch import nn


def input_embeddings(model: nn.Module) -> nn.Embedding:
    """The token embedding, from ids to hidden states."""
    of_transformers: Any = model
    return of_transformers.get_input_embeddings()


def output_embeddings(model: nn.Module) -> nn.Module:
    """The output embedding, from hidden states to logits."""
    of_transformers: Any = model
    return of_transformers.get_output_embeddings()
