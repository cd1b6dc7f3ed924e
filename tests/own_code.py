"""A checkpoint that brings its own modelling code, of the Kimi-K2 kind, written on the spot.

Experts are one module each, picked by a router with sigmoid scores, a bias for the choice alone and a scaling factor,
beside a shared expert; the first layer is dense. Outside of training, tokens are sorted by expert and computed without
gradients, as the code of such checkpoints does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from safetensors.torch import save_file
from tiny import VOCAB, randomise, tiny_tokenizer
from transformers import dynamic_module_utils
from transformers.dynamic_module_utils import get_class_from_dynamic_module

MODELING = dedent(
    '''
    """A small causal language model of its own."""

    import torch
    from torch import nn
    from transformers import GenerationMixin, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from .configuration_tiny_k2 import TinyK2Config


    class Norm(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(size))

        def forward(self, x):
            return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


    class Mlp(nn.Module):
        def __init__(self, size, width):
            super().__init__()
            self.gate_proj = nn.Linear(size, width, bias=False)
            self.up_proj = nn.Linear(size, width, bias=False)
            self.down_proj = nn.Linear(width, size, bias=False)

        def forward(self, x):
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


    class Gate(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.top_k, self.factor = config.num_experts_per_tok, config.routed_scaling_factor
            self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
            self.e_score_correction_bias = nn.Parameter(torch.empty(config.n_routed_experts))

        def forward(self, flat):
            scores = (flat.float() @ self.weight.float().T).sigmoid()
            index = (scores + self.e_score_correction_bias).topk(self.top_k, dim=-1).indices
            picked = scores.gather(1, index)
            return index, picked / picked.sum(-1, keepdim=True) * self.factor


    class Moe(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.gate = Gate(config)
            size, width = config.hidden_size, config.moe_intermediate_size
            self.experts = nn.ModuleList([Mlp(size, width) for _ in range(config.n_routed_experts)])
            self.shared_experts = Mlp(size, width)

        def forward(self, x):
            flat = x.reshape(-1, x.shape[-1])
            index, weight = self.gate(flat)
            return self.routed(flat, index, weight).reshape(x.shape) + self.shared_experts(x)

        @torch.no_grad()
        def routed(self, flat, index, weight):
            order = index.reshape(-1).argsort()
            rows = flat[order // index.shape[1]]
            counts = torch.bincount(index.reshape(-1), minlength=len(self.experts)).tolist()
            parts = rows.split(counts)
            done = torch.cat([expert(part) for expert, part in zip(self.experts, parts) if len(part)])
            slots = torch.empty_like(done)
            slots[order] = done
            return (slots.reshape(*index.shape, -1) * weight[..., None].to(done.dtype)).sum(1)


    class Attention(nn.Module):
        def __init__(self, config):
            super().__init__()
            size, self.heads = config.hidden_size, config.num_attention_heads
            self.qkv_proj, self.o_proj = nn.Linear(size, 3 * size, bias=False), nn.Linear(size, size, bias=False)

        def forward(self, x, mask):
            batch, length, size = x.shape
            q, k, v = self.qkv_proj(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.o_proj(out.transpose(1, 2).reshape(batch, length, size))


    class Layer(nn.Module):
        def __init__(self, config, index):
            super().__init__()
            self.self_attn = Attention(config)
            dense = index < config.first_k_dense_replace
            self.mlp = Mlp(config.hidden_size, config.intermediate_size) if dense else Moe(config)
            self.input_layernorm, self.post_attention_layernorm = Norm(config.hidden_size), Norm(config.hidden_size)

        def forward(self, hidden_states, mask):
            hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), mask)
            return (hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)),)


    class TinyK2PreTrainedModel(PreTrainedModel):
        config_class = TinyK2Config
        base_model_prefix = "model"


    class TinyK2Model(TinyK2PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleList([Layer(config, i) for i in range(config.num_hidden_layers)])
            self.norm = Norm(config.hidden_size)
            self.post_init()

        def forward(self, input_ids, attention_mask=None):
            length = input_ids.shape[1]
            mask = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()[None, None]
            if attention_mask is not None:
                real = attention_mask[:, None, None, :].bool()
                mask = mask & real | torch.eye(length, dtype=torch.bool, device=input_ids.device)
            hidden_states = self.embed_tokens(input_ids)
            for layer in self.layers:
                hidden_states = layer(hidden_states, mask)[0]
            return self.norm(hidden_states)


    class TinyK2ForCausalLM(TinyK2PreTrainedModel, GenerationMixin):
        def __init__(self, config):
            super().__init__(config)
            self.model = TinyK2Model(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def get_input_embeddings(self):
            return self.model.embed_tokens

        def get_output_embeddings(self):
            return self.lm_head

        def forward(self, input_ids, attention_mask=None, **kwargs):
            return CausalLMOutputWithPast(logits=self.lm_head(self.model(input_ids, attention_mask)))
    '''
)

CONFIGURATION = dedent(
    '''
    """Its configuration."""

    from transformers import PretrainedConfig


    class TinyK2Config(PretrainedConfig):
        model_type = "tiny_k2"

        def __init__(
            self, vocab_size=400, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=4,
            num_attention_heads=4, n_routed_experts=8, num_experts_per_tok=3, first_k_dense_replace=1,
            routed_scaling_factor=2.5, **kwargs,
        ):
            self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
            self.moe_intermediate_size, self.num_hidden_layers = moe_intermediate_size, num_hidden_layers
            self.num_attention_heads, self.n_routed_experts = num_attention_heads, n_routed_experts
            self.num_experts_per_tok, self.first_k_dense_replace = num_experts_per_tok, first_k_dense_replace
            self.routed_scaling_factor = routed_scaling_factor
            super().__init__(**kwargs)
    '''
)


@contextmanager
def module_cache(folder: Path) -> Iterator[None]:
    """Code of checkpoints is copied to ``folder`` and imported from there alone, whatever was imported before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        patch.setattr(sys, "path", list(sys.path))
        # The package remembers the folder that it came from.
        for name in _imported():
            patch.delitem(sys.modules, name)
        try:
            yield
        finally:
            for name in _imported():
                del sys.modules[name]


def _imported() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]


def write_checkpoint(folder: Path) -> Path:
    """The folder of such a checkpoint in float32: code, configuration, tokenizer, and random weights."""
    folder.mkdir(parents=True)
    (folder / "modeling_tiny_k2.py").write_text(MODELING, encoding="utf-8")
    (folder / "configuration_tiny_k2.py").write_text(CONFIGURATION, encoding="utf-8")
    names = {
        "AutoConfig": "configuration_tiny_k2.TinyK2Config",
        "AutoModelForCausalLM": "modeling_tiny_k2.TinyK2ForCausalLM",
    }
    config = {
        "model_type": "tiny_k2", "architectures": ["TinyK2ForCausalLM"], "auto_map": names, "dtype": "float32",
        "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tiny_tokenizer().save_pretrained(folder)
    cls = get_class_from_dynamic_module(names["AutoModelForCausalLM"], str(folder))
    torch.manual_seed(0)
    model = cls(cls.config_class(**{name: value for name, value in config.items() if name != "auto_map"}))
    randomise(model)
    save_file(
        {name: value.clone() for name, value in model.state_dict().items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder
