"""A stand-in of Qwen3-30B-A3B on a device: its shape, or a fraction of it, with random weights in bfloat16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers as hf
from torch import nn

from benchmarks.random_model import SHAPES

FULL = SHAPES["qwen3-30b-a3b"]
LAYERS, VOCABULARY, DENSE_WIDTH = 48, 151936, 6144
ROOM = 0.75
"""Share of a GPU's free memory that the weights may take; the rest is for statistics and edits."""


@dataclass(frozen=True)
class StandIn:
    """How large it is: width and heads are divided by ``scale``, and the experts' number where none is given.

    Attributes:
        scale: 1 is the shape itself.
        layers: decoder layers that are wanted.
        device: on which it is built.
        least_vocabulary: tokens of the tokenizer that is used with it.
        experts: number of experts, whatever the scale.
    """

    scale: int
    layers: int
    device: str
    least_vocabulary: int
    experts: int | None = None

    def config(self, layers: int) -> hf.Qwen3MoeConfig:
        """Of so many layers."""
        experts = self.experts or max(8, FULL["num_experts"] // self.scale)
        sizes = {
            **{name: max(1, size // self.scale) for name, size in FULL.items()},
            "head_dim": FULL["head_dim"] if self.scale == 1 else 32,
            "num_experts": experts,
            "num_experts_per_tok": min(FULL["num_experts_per_tok"], experts // 2),
            "intermediate_size": max(1, DENSE_WIDTH // self.scale),
            "vocab_size": max(self.least_vocabulary, VOCABULARY // self.scale),
        }
        return hf.Qwen3MoeConfig(**sizes, num_hidden_layers=layers, max_position_embeddings=4096)

    def build(self) -> hf.PreTrainedModel:
        """The model with as many of the layers as fit, drawn part by part on the device: no copy lies elsewhere."""
        layers = self._fitting()
        with torch.device("meta"):
            model = hf.AutoModelForCausalLM.from_config(self.config(layers), dtype=torch.bfloat16)
        torch.manual_seed(0)
        body = model.model
        for part in [body.embed_tokens, *body.layers, body.norm, model.lm_head]:
            part.to_empty(device=self.device)
            _draw(part)
        # Its frequencies are computed when it is made, and no weight holds them.
        body.rotary_emb = type(body.rotary_emb)(model.config).to(self.device)
        return model.eval()

    def _fitting(self) -> int:
        if torch.device(self.device).type != "cuda":
            return self.layers
        with torch.device("meta"):
            one, two = (
                sum(p.numel() for p in hf.AutoModelForCausalLM.from_config(self.config(n)).parameters()) for n in (1, 2)
            )
        room = ROOM * torch.cuda.mem_get_info(self.device)[0] / torch.bfloat16.itemsize
        return max(1, min(self.layers, 1 + int((room - one) // (two - one))))


def _draw(part: nn.Module) -> None:
    """Weights as when training begins: normal matrices, and ones in the norms."""
    with torch.no_grad():
        for weight in part.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.02)
            else:
                weight.fill_(1.0)
