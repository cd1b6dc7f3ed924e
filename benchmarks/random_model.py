"""Models of random weights in the proportions, or the shapes, of Qwen3-30B-A3B."""

from __future__ import annotations

import torch
import transformers
from torch import nn

SHAPES: dict[str, dict[str, int]] = {
    "middle": {
        "hidden_size": 512, "moe_intermediate_size": 192, "num_experts": 32, "num_experts_per_tok": 8,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
    },
    "qwen3-30b-a3b": {
        "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    },
}  # fmt: skip
"""Sizes of a layer; "middle" is Qwen3-30B-A3B at a quarter of its width and experts."""


def random_model(shape: str, layers: int, vocabulary: int, dtype: str, device: str) -> nn.Module:
    """A Qwen3-MoE model with ``layers`` decoder layers of a shape, drawn on ``device`` from one seed."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **SHAPES[shape], vocab_size=vocabulary, num_hidden_layers=layers, max_position_embeddings=4096
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.eval()
