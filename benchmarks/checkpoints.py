"""Seconds and memory of a patch on a checkpoint in shards, beside the size of the larger shard."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from benchmarks.harness import peak_of
from easyedit_moe.algebra.routed_keys import FactoredUpdate
from easyedit_moe.checkpoints.apply import apply_patch
from easyedit_moe.checkpoints.revert import revert_patch
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches.files import load_patch
from easyedit_moe.patches.weights import writing


@dataclass(frozen=True)
class Options:
    """A Qwen3-MoE of random weights, of which ``edited`` layers are edited."""

    quick: bool = False
    experts: int = 64
    hidden: int = 1024
    width: int = 512
    layers: int = 4
    edited: int = 2
    shards: int = 2


def run(options: Options) -> list[dict[str, Any]]:
    """Rows of "checkpoint in shards"; each command in a process of its own, so that nothing else is counted."""
    if options.quick:
        options = Options(quick=True, experts=8, hidden=128, width=64)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        made = _in_process(_make, options, path)
        return [_in_process(_apply, made, path), _in_process(_revert, made, path)]


def _in_process(work: Any, *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def _make(options: Options, folder: Path) -> dict[str, Any]:
    """A checkpoint and a patch; the sizes of its shards."""
    config = hf.Qwen3MoeConfig(
        vocab_size=1000,
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=options.hidden,
        moe_intermediate_size=options.width,
        num_experts=options.experts,
        num_experts_per_tok=4,
    )
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder / "source", max_shard_size=int(size / options.shards * 1.02))
    view = MoELayerView(model)
    with writing(view) as writer:
        for layer in range(options.edited):
            experts = tuple(range(0, options.experts, 2))
            left, columns = torch.randn(options.hidden, 8) * 0.01, tuple(torch.arange(8) for _ in experts)
            right = tuple(torch.randn(options.width, 8) * 0.01 for _ in experts)
            writer.write(layer, FactoredUpdate(left, experts, columns, right))
        writer.finish({}, model_fingerprint(view)).save(folder / "patch.safetensors")
    shards = [file.stat().st_size for file in (folder / "source").glob("*.safetensors")]
    return {"shards": len(shards), "checkpoint": sum(shards), "larger shard": max(shards)}


def _apply(made: dict[str, Any], folder: Path) -> dict[str, Any]:
    patch = load_patch(folder / "patch.safetensors")
    seconds, peak, _ = peak_of(lambda: apply_patch(patch, folder / "source", folder / "out"))
    return _row("apply", made, seconds, peak)


def _revert(made: dict[str, Any], folder: Path) -> dict[str, Any]:
    patch = load_patch(folder / "patch.safetensors")
    seconds, peak, _ = peak_of(lambda: revert_patch(patch, folder / "out", folder / "back", folder / "source"))
    index = json.loads((folder / "back" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    same = all((folder / "back" / f).read_bytes() == (folder / "source" / f).read_bytes() for f in files)
    return {**_row("revert", made, seconds, peak), "byte-equal": same}


def _row(command: str, made: dict[str, Any], seconds: float, peak: int) -> dict[str, Any]:
    return {
        "benchmark": "checkpoint in shards",
        "command": command,
        "shards": made["shards"],
        "checkpoint_MB": made["checkpoint"] / 1e6,
        "larger_shard_MB": made["larger shard"] / 1e6,
        "seconds": seconds,
        "peak_growth_MB": peak / 1e6,
        "peak_per_shard": peak / made["larger shard"],
    }
