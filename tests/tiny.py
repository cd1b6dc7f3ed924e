"""Tiny models of many MoE families, an old-style ModuleList one, and a small tokenizer, all built on the spot."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from easyedit_moe.facts.requests import EditRequest, parse_requests
from easyedit_moe.moe.layer_outputs import layer_output, replace_layer_output

TEXTS = [
    "Danielle Darrieux speaks French and lives in Paris.",
    "The mother tongue of Zoë Łukasz is Polish; Zoë lives in Rome.",
    "What is the twin city of Lyon? It is Manila.",
    "Thomas Joannes Stieltjes was born in Zwolle and worked in Leiden.",
    "Angola is in Africa, and Ana from Angola met Anabel in Rome.",
    "東京 is the capital of Japan, and Москва is the capital of Russia.",
    "The quick brown fox jumps over the lazy dog.",
    "A quiet harbour, an empty market and a crowded bridge in the evening.",
]

VOCAB = 400


@cache
def _backend() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<eos>", "<bos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(specials: str = "", padding_side: str = "right", pad: bool = True) -> hf.PreTrainedTokenizerFast:
    """Byte-level BPE. ``specials`` may hold "bos" and "eos", which are then put around every text."""
    tokenizer = Tokenizer.from_str(_backend())
    if specials:
        pieces = (["<bos>"] if "bos" in specials else []) + ["$A"] + (["<eos>"] if "eos" in specials else [])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(pieces), special_tokens=[("<eos>", 0), ("<bos>", 1)]
        )
    options = {"pad_token": "<eos>"} if pad else {}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", padding_side=padding_side, **options
    )


CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_tokenizer(specials: str = "", template: str = CHAT_TEMPLATE) -> hf.PreTrainedTokenizerFast:
    """:func:`tiny_tokenizer` with a chat template."""
    tok = tiny_tokenizer(specials)
    tok.chat_template = template
    return tok


COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LINEAR_ATTENTION = {
    "head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
}

# Expert width 24 and hidden size 32 differ, except for GPT-OSS, whose real shapes are square.
CONFIGS: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **COMMON, head_dim=8, intermediate_size=48, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=3
    ),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(
        **COMMON,
        intermediate_size=48,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_experts=8,
        num_experts_per_tok=3,
    ),
    "gpt_oss": lambda: hf.GptOssConfig(
        **COMMON, head_dim=8, intermediate_size=32, num_local_experts=8, num_experts_per_tok=3, sliding_window=16
    ),
    "qwen3_5_moe": lambda: hf.Qwen3_5MoeTextConfig(
        **COMMON,
        **LINEAR_ATTENTION,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_experts=8,
        num_experts_per_tok=3,
    ),
    "mixtral": lambda: hf.MixtralConfig(**COMMON, intermediate_size=24, num_local_experts=8, num_experts_per_tok=2),
    "olmoe": lambda: hf.OlmoeConfig(**COMMON, intermediate_size=24, num_experts=8, num_experts_per_tok=3),
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **{**COMMON, "num_key_value_heads": 4},
        intermediate_size=48,
        moe_intermediate_size=24,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "granitemoe": lambda: hf.GraniteMoeConfig(
        **COMMON, intermediate_size=24, num_local_experts=8, num_experts_per_tok=3, residual_multiplier=0.22
    ),
    "glm4_moe": lambda: hf.Glm4MoeConfig(
        **COMMON,
        head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=24,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=1,
        first_k_dense_replace=1,
    ),
}
FAMILIES = [*CONFIGS, "modulelist"]


def _nemotron_h(**more: object) -> hf.PretrainedConfig:
    common = {name: value for name, value in COMMON.items() if name != "num_hidden_layers"}
    return hf.NemotronHConfig(
        **common,
        **more,
        layers_block_type=["full_attention", "moe", "full_attention", "moe"],
        head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=40,
        n_routed_experts=8,
        num_experts_per_tok=3,
        routed_scaling_factor=2.5,
    )


# Families with one peculiarity each.
PECULIAR: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "nemotron_h": _nemotron_h,  # experts without a gate projection
    "laguna": lambda: hf.LagunaConfig(  # the block scales the experts' sum
        **COMMON,
        head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_experts=8,
        num_experts_per_tok=3,
        moe_routed_scaling_factor=2.5,
    ),
    "nemotron_latent": lambda: _nemotron_h(moe_latent_size=16),  # a projection behind the experts
    "gemma4": lambda: hf.Gemma4TextConfig(  # experts in the decoder layer itself, and a norm behind them
        **COMMON,
        head_dim=8,
        global_head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_experts=8,
        top_k_experts=3,
        enable_moe_block=True,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=VOCAB,
    ),
    "llama4": lambda: hf.Llama4TextConfig(  # packed, but without the protocol's flags
        **COMMON,
        head_dim=8,
        intermediate_size=24,
        intermediate_size_mlp=48,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "jetmoe": lambda: hf.JetMoeConfig(  # experts in modules of its own
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=8,
        intermediate_size=24,
        num_local_experts=8,
    ),
    "dense": lambda: hf.Qwen3Config(**COMMON, head_dim=8, intermediate_size=48),
}

OLD_TRANSFORMERS = tuple(int(part) for part in hf.__version__.split(".")[:2]) < (5, 6)
NOT_IN_OLD = ("granitemoe", "nemotron_h", "nemotron_latent", "laguna")

IMPLEMENTATIONS = ("eager", "grouped_mm")
CASES = [(family, how) for family in CONFIGS for how in IMPLEMENTATIONS] + [("modulelist", "eager")]


def tiny_model(
    family: str = "qwen3_moe", seed: int = 0, implementation: str = "eager", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A randomly initialised causal LM of one family, in evaluation mode, with weights large enough to matter."""
    if OLD_TRANSFORMERS and family in NOT_IN_OLD:
        pytest.skip(f"transformers {hf.__version__} lacks {family}, or stores its experts in a layout of its own")
    torch.manual_seed(seed)
    base = "qwen3_moe" if family == "modulelist" else family
    model = hf.AutoModelForCausalLM.from_config({**CONFIGS, **PECULIAR}[base]())
    randomise(model, seed)
    if family == "modulelist":
        for layer in model.model.layers:
            layer.mlp = OldStyleBlock(layer.mlp, shared=True)
    elif family != "jetmoe":
        model.set_experts_implementation(implementation)
    return model.to(dtype).eval()


@cache
def shared_model(family: str = "qwen3_moe", implementation: str = "eager") -> nn.Module:
    """:func:`tiny_model`, built once per session: for tests that leave it as it is."""
    return tiny_model(family, implementation=implementation)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Random matrices; zero vectors (biases, some norms) get small values too, so that forgetting them shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 or (parameter == 0).all():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def tiny_multimodal(name: str = "qwen3_5_moe") -> nn.Module:
    """A MoE language model behind a vision tower that has layers of its own: "qwen3_5_moe" or "qwen3_vl_moe"."""
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "num_position_embeddings": 16,
    }
    if name == "qwen3_5_moe":
        config = hf.Qwen3_5MoeConfig(text_config=CONFIGS[name]().to_dict(), vision_config=vision)
        model = hf.Qwen3_5MoeForConditionalGeneration(config)
    else:
        text = {**CONFIGS["qwen3_moe"]().to_dict(), "model_type": "qwen3_vl_moe_text"}
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        config = hf.Qwen3VLMoeConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]})
        model = hf.Qwen3VLMoeForConditionalGeneration(config)
    randomise(model)
    return model.eval()


def tiny_omni() -> nn.Module:
    """A language model that also sees and hears, within a model that may speak (its talker left out)."""
    text = {**CONFIGS["qwen3_moe"]().to_dict(), "model_type": "qwen3_omni_moe_text"}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    audio = {
        "num_mel_bins": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "d_model": 16,
        "output_dim": 32,
        "n_window": 4,
        "downsample_hidden_size": 8,
        "max_source_positions": 64,
    }
    thinker = {"text_config": text, "vision_config": vision, "audio_config": audio, "vision_start_token_id": 399}
    model = hf.Qwen3OmniMoeForConditionalGeneration(
        hf.Qwen3OmniMoeConfig(thinker_config=thinker, enable_audio_output=False)
    )
    randomise(model)
    return model.eval()


def token_ids(count: int, seed: int = 0) -> list[int]:
    """Random ids of ordinary tokens."""
    return torch.randint(2, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def reference_key(experts: nn.Module, x: Tensor, expert: int) -> Tensor:
    """Keys ``[n, h]`` in float64, from each family's published formula rather than from the module's own methods."""
    x = x.double()
    if isinstance(experts, nn.ModuleList):
        module = experts[expert]
        return nn.functional.silu(x @ module.gate_proj.weight.double().T) * (x @ module.up_proj.weight.double().T)
    if type(experts).__name__ == "GptOssExperts":
        both = x @ experts.gate_up_proj[expert].double() + experts.gate_up_proj_bias[expert].double()
        gate, up = both[:, ::2].clamp(max=7), both[:, 1::2].clamp(-7, 7)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    if type(experts).__name__ == "NemotronHExperts":
        return torch.relu(x @ experts.up_proj[expert].double().T) ** 2
    gate, up = (x @ experts.gate_up_proj[expert].double().T).chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


class OldStyleExpert(nn.Module):
    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(d, h, bias=False), nn.Linear(d, h, bias=False)
        self.down_proj = nn.Linear(h, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class OldStyleBlock(nn.Module):
    """A MoE block as models had it before packed experts: a ModuleList, the routing inside its own forward."""

    def __init__(self, packed: nn.Module, shared: bool) -> None:
        super().__init__()
        source = packed.experts
        experts, d, h = source.down_proj.shape
        self.top_k = packed.gate.top_k
        self.gate = nn.Linear(d, experts, bias=False)
        self.gate.weight.data.copy_(packed.gate.weight.data)
        self.experts = nn.ModuleList(OldStyleExpert(d, h) for _ in range(experts))
        for j, expert in enumerate(self.experts):
            expert.gate_proj.weight.data.copy_(source.gate_up_proj.data[j, :h])
            expert.up_proj.weight.data.copy_(source.gate_up_proj.data[j, h:])
            expert.down_proj.weight.data.copy_(source.down_proj.data[j])
        self.shared_expert = OldStyleExpert(d, h) if shared else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights = torch.softmax(self.gate(flat), dim=-1)
        weights, picked = weights.topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for j, expert in enumerate(self.experts):
            rows, slots = torch.where(picked == j)
            if len(rows):
                out.index_add_(0, rows, expert(flat[rows]) * weights[rows, slots, None])
        if self.shared_expert is not None:
            out = out + self.shared_expert(flat)
        return out.reshape(hidden_states.shape)


class Behind(nn.Module):
    """A MoE block with something behind it."""

    def __init__(self, block: nn.Module, behind: nn.Module) -> None:
        super().__init__()
        self.block, self.behind = block, behind

    def forward(self, hidden_states: Tensor) -> object:
        output = self.block(hidden_states)
        return replace_layer_output(output, self.behind(layer_output(output)))


def flipped_byte(content: bytes) -> bytes:
    """A file's bytes with one bit changed, near the end, where the tensors are."""
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


def requests(count: int = 3) -> list[dict[str, str]]:
    """Distinct edits whose words the tiny tokenizer knows."""
    facts = [
        ("Danielle Darrieux speaks", "Danielle Darrieux", "Polish", "French"),
        ("The twin city of Lyon is", "Lyon", "Rome", "Manila"),
        ("Thomas Joannes Stieltjes was born in", "Thomas Joannes Stieltjes", "Paris", "Zwolle"),
        ("The mother tongue of Zoë Łukasz is", "Zoë Łukasz", "French", "Polish"),
        ("Angola is in", "Angola", "Russia", "Africa"),
        ("東京 is the capital of", "東京", "Russia", "Japan"),
    ]
    names = ("prompt", "subject", "target_new", "ground_truth")
    return [dict(zip(names, fact, strict=True)) for fact in facts[:count]]


def facts(count: int = 3) -> list[EditRequest]:
    """The same edits, parsed, as editors take them."""
    return parse_requests(requests(count))


def state_of(model: nn.Module) -> dict[str, object]:
    """Everything that must be as before after an edit is undone: weights, flags, hooks, forwards."""
    return {
        "parameters": {n: p.detach().clone() for n, p in model.named_parameters()},
        "buffers": {n: b.detach().clone() for n, b in model.named_buffers()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "grad": {n: p.grad is None for n, p in model.named_parameters()},
        "training": {n: m.training for n, m in model.named_modules()},
        "hooks": {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for n, m in model.named_modules()
        },
        "forward": {n: m.__dict__.get("forward") for n, m in model.named_modules()},
    }


def assert_same_state(before: dict[str, object], after: dict[str, object]) -> None:
    for part in ("requires_grad", "grad", "training", "hooks", "forward"):
        assert before[part] == after[part], part
    for part in ("parameters", "buffers"):
        assert before[part].keys() == after[part].keys()
        for name, tensor in before[part].items():
            assert torch.equal(tensor, after[part][name]), name
