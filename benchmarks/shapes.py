"""True shapes of the papers' three models, and random problems with their sparsity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor, nn

from easyedit_moe.algebra.routed_keys import RoutedKeys
from easyedit_moe.moe.shapes import Shapes


@dataclass(frozen=True)
class ModelShape:
    """One MoE layer's sizes; ``ranks`` (expert, out, in), layers and lambda are those of the hparams that ship."""

    name: str
    experts: int
    active: int
    d_model: int
    d_hidden: int
    ranks: tuple[int, int, int]
    layers: tuple[int, ...]
    passes: int

    def planned(self) -> Shapes:
        """For the memory planner."""
        return Shapes(self.experts, self.active, self.d_model, self.d_hidden, 1, 0, 0, 2)


MODELS = {
    "qwen3-30b-a3b": ModelShape("qwen3-30b-a3b", 128, 8, 2048, 768, (64, 512, 256), (3, 4, 5, 6, 7), 4),
    "gpt-oss-20b": ModelShape("gpt-oss-20b", 32, 4, 2880, 2880, (32, 720, 720), (3, 4, 5), 10),
    "qwen3.6-35b-a3b": ModelShape("qwen3.6-35b-a3b", 256, 8, 2048, 512, (64, 512, 256), (3, 4, 5, 6), 2),
}
QUICK = ModelShape("reduced", 8, 2, 48, 32, (4, 16, 12), (1, 2), 4)


def random_keys(shape: ModelShape, tokens: int, device: str = "cpu", seed: int = 0) -> RoutedKeys:
    """Normal keys; each token reaches K different experts, with gates that sum to 1."""
    draw = torch.Generator().manual_seed(seed)
    expert = torch.rand(tokens, shape.experts, generator=draw).topk(shape.active).indices
    gate = torch.randn(tokens, shape.active, generator=draw).softmax(1)
    key = torch.randn(tokens, shape.active, shape.d_hidden, generator=draw)
    return RoutedKeys(expert, gate, key).to(device)


def random_residual(shape: ModelShape, tokens: int, device: str = "cpu") -> Tensor:
    """``[T, d]`` normal residuals."""
    return torch.randn(tokens, shape.d_model, generator=torch.Generator().manual_seed(1)).to(device)


def one_layer_model(shape: ModelShape, device: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model of one decoder layer with experts of this shape; only the down-projections are drawn at random."""
    config = hf.Qwen3MoeConfig(
        vocab_size=32, hidden_size=shape.d_model, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        head_dim=8, moe_intermediate_size=shape.d_hidden, num_experts=shape.experts, num_experts_per_tok=shape.active,
    )  # fmt: skip
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device=device)
    with torch.no_grad():
        for expert in model.model.layers[0].mlp.experts.down_proj:
            expert.copy_(torch.randn(expert.shape, device=device) * 0.02)
    return model
