"""Tiny, randomly initialised models of every family of transformers that holds experts.

A family is a folder of ``transformers/models``. Its configuration class is filled with small sizes by the names of its
fields; what a family needs beyond that stands in `PECULIAR`.
"""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 400
LAYERS = 4
_NO_TEXT = ("bamba", "vitpose_backbone")
"""Folders that name experts without holding a text model's: a field left unused, and a vision backbone."""
_NESTED = ("kimi_k25", "nemotron_h_omni")
"""Folders whose text part is another folder's model with experts."""

_CLASSES = {
    "nemotron_h_omni": "NemotronH_Omni_Reasoning_V3",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
"""Where the name of the class that understands text says nothing of a head."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "d_model": 32, "n_layers": LAYERS, "num_hidden_layers": LAYERS,
    "num_layers": LAYERS, "num_decoder_layers": LAYERS, "encoder_layers": 2, "decoder_layers": LAYERS,
    "num_attention_heads": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "kv_channels": 8, "d_kv": 8, "max_position_embeddings": 128,
    "intermediate_size": 48, "moe_intermediate_size": 24, "expert_ffn_hidden_size": 24, "ffn_hidden_size": 48,
    "d_ff": 24, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "shared_expert_intermediate_size": 40,
    "shared_experts_intermediate_size": 40, "moe_shared_expert_intermediate_size": 40, "shared_intermediate_size": 40,
    "share_expert_dim": 40, "dense_intermediate_size": 48, "intermediate_size_mlp": 48,
    "num_experts": 8, "n_routed_experts": 8, "num_local_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 3, "num_experts_per_token": 3, "moe_topk": 3, "moe_top_k": 3, "moe_k": 3, "top_k_experts": 3,
    "n_group": 2, "num_expert_group": 2, "topk_group": 2, "n_shared_experts": 1, "num_shared_experts": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_layer_start_index": 1, "moe_layer_end_index": LAYERS - 1,
    "sliding_window": 16, "sliding_window_size": 16, "attention_chunk_size": 16,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "qk_head_dim": 12, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 64, "o_lora_rank": 16, "o_groups": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_head_dim": 8, "linear_num_heads": 4, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    "swa_head_dim": 8, "swa_v_head_dim": 8, "global_head_dim": 8,
    "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1,
    "mamba_dt_rank": 4, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1,
    "mamba_chunk_size": 16, "chunk_size": 16, "router_hidden_size": 16, "text_hidden_size": 32,
    "num_nextn_predict_layers": 0, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0,
    "decoder_start_token_id": 0, "depth": 1, "out_hidden_size": 32, "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCABULARY, "projection_hidden_dim": 48, "projection_intermediate_size": 48,
}  # fmt: skip
"""Small sizes by the name of a field; expert width 24 and hidden size 32 differ, so that a transposed matrix shows."""

_PER_LAYER = ("layer_types", "mlp_layer_types", "indexer_types", "moe_layers", "no_rope_layers", "per_layer_config")
"""Lists with an entry per layer, which the class makes anew for the tiny number of layers."""

_DENSE_FIRST = ["dense", "sparse", "sparse", "sparse"]
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
PECULIAR: dict[str, dict[str, Any]] = {
    "gemma4": {"enable_moe_block": True},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "nemotron_h": {"layers_block_type": ["full_attention", "moe", "full_attention", "moe"]},
    "zaya": {"num_experts_per_tok": 1},
    "qwen4_exp": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
        "indexer_compress_ratio": 4, "hc_lowrank": 8,
    },
    "doge": {"is_moe": True},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}, "ffn_config": {}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": _DENSE_FIRST}},
    "unlimited_ocr": {"text_config": {"mlp_layer_types": _DENSE_FIRST}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]}}},
    "dots3_note": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
        "swa_head_dim": 12, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
    },
    "muse_spark": {
        "text_config": {"moe_hidden_size": 16},
        "audio_config": {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
    },
    "glm4v_moe": {"text_config": {"rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}}},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "qk_head_dim": 8}},
    "longcat_flash": {"head_dim": 4, "zero_expert_num": 4},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "nemotron_h_omni": {
        "text_config": {"layers_block_type": ["full_attention", "moe", "full_attention", "moe"]},
        "vision_config": {"video_temporal_patch_size": 2},
    },
    "qwen3_omni_moe": {"vision_start_token_id": 399, "text_config": {"rope_parameters": _MROPE}},
    "qwen3_vl_moe": {"text_config": {"rope_parameters": _MROPE}},
}  # fmt: skip
"""What a family's configuration needs beyond `SIZES`; names of sub-configurations lead to dicts of their own."""


@cache
def families() -> tuple[str, ...]:
    """Folders of the installed transformers whose text model holds experts, found in their source."""
    root = Path(transformers.__file__).parent / "models"
    marks = re.compile(r"class \w*Experts\w*\(|num_experts|num_local_experts|n_routed_experts")
    found = {
        path.parent.name
        for path in root.glob("*/modeling_*.py")
        if path.name == f"modeling_{path.parent.name}.py" and marks.search(path.read_text(encoding="utf-8"))
    }
    nested = {name for name in _NESTED if (root / name).is_dir()}
    return tuple(sorted((found | nested) - set(_NO_TEXT)))


def model_class(family: str) -> type[nn.Module] | None:
    """The class of a family's model with a language model's head; None if it has none."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    if family in _CLASSES:
        return getattr(module, _CLASSES[family])
    own = [c for n, c in vars(module).items() if isinstance(c, type) and c.__module__ == module.__name__]
    for ending in ("ForCausalLM", "ForConditionalGeneration"):
        found = [c for c in own if c.__name__.endswith(ending) and issubclass(c, transformers.PreTrainedModel)]
        if found:
            return min(found, key=lambda c: len(c.__name__))
    return None


def tiny_config(family: str) -> Any:
    """The configuration of a family's tiny model."""
    cls: Any = model_class(family)
    return _filled(cls.config_class, PECULIAR.get(family, {}))


def _filled(cls: Any, peculiar: dict[str, Any]) -> Any:
    """A configuration of ``cls`` with small sizes where it has a field of that name."""
    plain = cls()
    known = getattr(cls, "__dataclass_fields__", {})
    values = {name: size for name, size in SIZES.items() if name in known and not _is_list(plain.__dict__.get(name))}
    values |= {name: None for name in _PER_LAYER if name in known}
    for name in getattr(cls, "sub_configs", {}):
        inner = peculiar.get(name, {})
        found = getattr(plain, name, None)
        if found is None or inner is None:
            values[name] = None
        else:
            values[name] = _filled(type(found), inner).to_dict()
    values |= {name: value for name, value in peculiar.items() if name not in getattr(cls, "sub_configs", {})}
    return cls(**values)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | dict)


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A family's tiny model in evaluation mode, with weights large enough to matter."""
    cls: Any = model_class(family)
    torch.manual_seed(seed)
    model = cls._from_config(tiny_config(family))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 or (parameter == 0).all():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.to(dtype).eval()
