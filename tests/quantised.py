"""Checkpoints in quantised formats, made on the spot from saved tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
FP8_BLOCK = 8


def set_config(folder: Path, **values: Any) -> None:
    """Set entries of a saved config."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def to_mxfp4(folder: Path) -> dict[str, Tensor]:
    """Replace the experts' weights in a saved GPT-OSS by random MXFP4 ones; returns what these mean."""
    draw, meaning = torch.Generator().manual_seed(0), {}
    for file in sorted(folder.glob("*.safetensors")):
        kept: dict[str, Tensor] = {}
        for name, tensor in load_file(file).items():
            if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                kept[name] = tensor.bfloat16()
                continue
            experts, width, height = tensor.shape
            blocks = torch.randint(0, 256, (experts, height, width // 32, 16), generator=draw, dtype=torch.uint8)
            scales = torch.randint(120, 126, (experts, height, width // 32), generator=draw, dtype=torch.uint8)
            kept[f"{name}_blocks"], kept[f"{name}_scales"] = blocks, scales
            pairs = torch.stack([FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]], dim=-1).flatten(3)
            values = pairs * 2.0 ** (scales.float() - 127)[..., None]
            meaning[name] = values.reshape(experts, height, width).transpose(1, 2)
        save_file(kept, file, metadata={"format": "pt"})
    _reindex(folder)
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}
    set_config(folder, quantization_config=settings, dtype="bfloat16")
    return meaning


def to_fp8(folder: Path) -> dict[str, Tensor]:
    """Replace the projections of a saved Qwen3-MoE by FP8 ones with scales per block; returns what these mean."""
    meaning: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        kept: dict[str, Tensor] = {}
        for name, tensor in load_file(file).items():
            if not name.endswith("_proj.weight"):
                kept[name] = tensor.bfloat16()
                continue
            rows, columns = tensor.shape
            blocks = tensor.reshape(rows // FP8_BLOCK, FP8_BLOCK, columns // FP8_BLOCK, FP8_BLOCK)
            scale = blocks.abs().amax((1, 3)) / 448
            stored = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            kept[name] = stored.reshape(rows, columns)
            kept[f"{name}_scale_inv"] = scale
            meaning[name] = (stored.float() * scale[:, None, :, None]).reshape(rows, columns)
        save_file(kept, file, metadata={"format": "pt"})
    _reindex(folder)
    settings = {"quant_method": "fp8", "weight_block_size": [FP8_BLOCK, FP8_BLOCK], "activation_scheme": "dynamic"}
    set_config(folder, quantization_config=settings, dtype="bfloat16")
    return meaning


def _reindex(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    if path.exists():
        index = json.loads(path.read_text())
        files = {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
        index["weight_map"] = {name: file for file, tensors in files.items() for name in tensors}
        index["metadata"]["total_size"] = sum(t.nbytes for tensors in files.values() for t in tensors.values())
        path.write_text(json.dumps(index))
