"""Experts in MXFP4 (GPT-OSS): what they mean, and one layer's made dense while the others stay as they are.

A parameter ``experts.down_proj`` is stored as ``experts.down_proj_blocks`` (two 4-bit numbers a byte) and
``experts.down_proj_scales``. transformers loads a layer from dense tensors where the quantisation config lists its
experts under ``modules_to_not_convert``, so only edited layers have to change.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from easyedit_moe.checkpoints.shards import INDEX, Added, Checkpoint, read_json, replace_tensors

DTYPE = torch.bfloat16
PROJECTIONS = ("gate_up_proj", "down_proj")


def tensors_of(name: str) -> list[str]:
    """Names of the tensors that hold a parameter in MXFP4."""
    return [f"{name}_blocks", f"{name}_scales"]


def is_stored(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a checkpoint holds a parameter in MXFP4."""
    return all(tensor in checkpoint.tensors for tensor in tensors_of(name))


def read(checkpoint: Checkpoint, name: str, row: int | range | None = None) -> Tensor:
    """A parameter ``[E, rows, columns]`` as loading dequantises it to bfloat16, or one or neighbouring entries."""
    blocks, scales = (checkpoint.read(tensor, row) for tensor in tensors_of(name))
    if row is None or isinstance(row, range):
        return convert_moe_packed_tensors(blocks, scales, dtype=DTYPE)
    return convert_moe_packed_tensors(blocks[None], scales[None], dtype=DTYPE)[0]


def dense_modules(checkpoint: Checkpoint, parameters: Iterable[str]) -> list[str]:
    """Experts modules that must become dense before these parameters can be written."""
    return sorted({name.rpartition(".")[0] for name in parameters if is_stored(checkpoint, name)})


def make_dense(checkpoint: Checkpoint, modules: Iterable[str], file: str, target: Path) -> None:
    """Write one file anew with the MXFP4 tensors of some modules that lie in it as dense ones; others byte by byte.

    Where a parameter's blocks and scales lie in two files, the dense tensor goes into that of the blocks.
    """
    gone: list[str] = []
    added: dict[str, Added] = {}
    for name in _parameters(checkpoint, modules):
        blocks, scales = (checkpoint.tensors[tensor] for tensor in tensors_of(name))
        gone += [entry.name for entry in (blocks, scales) if entry.file == file]
        if blocks.file == file:
            experts, rows, groups, half = blocks.shape
            shape = (experts, groups * half * 2, rows)
            added[name] = Added(shape, DTYPE, partial(read, checkpoint, name))
    replace_tensors(checkpoint.files[file], target, gone, added)


def changed_files(checkpoint: Checkpoint, modules: Iterable[str]) -> set[str]:
    """Files in which tensors of these modules lie."""
    names = [tensor for name in _parameters(checkpoint, modules) for tensor in tensors_of(name)]
    return {checkpoint.tensors[name].file for name in names}


def dense_index(folder: Path, checkpoint: Checkpoint, modules: Iterable[str]) -> str:
    """The text of the index when these modules are dense."""
    index = read_json(folder / INDEX)
    grown = 0
    for name in _parameters(checkpoint, modules):
        blocks, scales = (checkpoint.tensors[tensor] for tensor in tensors_of(name))
        for entry in (blocks, scales):
            del index["weight_map"][entry.name]
            grown -= entry.size
        index["weight_map"][name] = blocks.file
        grown += 4 * blocks.size  # two numbers a byte become two bytes a number
    if "total_size" in index.get("metadata", {}):
        index["metadata"]["total_size"] += grown
    return json.dumps(index, indent=2) + "\n"


def dense_config(folder: Path, modules: Iterable[str]) -> str:
    """The text of config.json when these modules are dense."""
    config = read_json(folder / "config.json")
    settings: dict[str, Any] = config["quantization_config"]
    kept = settings.get("modules_to_not_convert") or []
    settings["modules_to_not_convert"] = [*kept, *(module for module in modules if module not in kept)]
    return json.dumps(config, indent=2) + "\n"


def _parameters(checkpoint: Checkpoint, modules: Iterable[str]) -> list[str]:
    names = [f"{module}.{projection}" for module in modules for projection in PROJECTIONS]
    return [name for name in names if is_stored(checkpoint, name)]
