"""The tensors of an adapter, under the names that PEFT and servers read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from easyedit_moe.serving.factors import LayerFactors, padded

PREFIX = "base_model.model."
"""What PEFT puts before the names of the base model's modules."""


@dataclass(frozen=True)
class ExpertNames:
    """What an adapter calls one layer's experts.

    Attributes:
        module: the experts' module.
        down: name of an expert's down-projection within ``module``, with ``{expert}`` for its number.
        inputs: names of the projections before it, such as gate and up; each maps d to h.
    """

    module: str
    down: str = "{expert}.down_proj"
    inputs: tuple[str, ...] = ("{expert}.gate_proj", "{expert}.up_proj")


def packed_tensors(
    layers: Sequence[LayerFactors],
    names: Sequence[ExpertNames],
    rank: int,
    turned: bool = False,
    with_inputs: bool = False,
) -> dict[str, Tensor]:
    """One pair for all experts of a layer: ``lora_A [rank * E, h]``, ``lora_B [d, rank * E]``.

    Row ``j * rank + k`` of A and column ``k * E + j`` of B belong to expert j: the expert's index is the slow one in A
    and the fast one in B. That is how PEFT stores the adapter of a 3-D parameter (``target_parameters``).

    Args:
        layers: the update.
        names: of each layer's experts.
        rank: of every expert; smaller updates are filled up with zeros.
        turned: A and B change their roles where the parameter is stored ``[E, d, h]``, as PEFT 0.18 has it:
            ``lora_A [rank * E, d]``, ``lora_B [h, rank * E]``.
        with_inputs: also the projections before, all zeros, as ``base_layer`` within: for servers that insist on them.
    """
    tensors: dict[str, Tensor] = {}
    for factors, called in zip(layers, names, strict=True):
        pairs = list(padded(factors, rank))
        first = torch.stack([a for _, a in pairs])
        last = torch.stack([b for b, _ in pairs])
        if turned and not factors.stored.transposed:
            first, last = last.mT, first.mT
        key = f"{PREFIX}{called.module}"
        tensors[f"{key}.lora_A.weight"] = first.reshape(-1, first.shape[2]).contiguous()
        tensors[f"{key}.lora_B.weight"] = last.permute(1, 2, 0).reshape(last.shape[1], -1).contiguous()
        if with_inputs:
            width, count = len(called.inputs) * factors.d_hidden, rank * factors.stored.experts
            tensors[f"{key}.base_layer.lora_A.weight"] = first.new_zeros(count, factors.d_model)
            tensors[f"{key}.base_layer.lora_B.weight"] = first.new_zeros(width, count)
    return tensors


def expert_tensors(
    layers: Sequence[LayerFactors], names: Sequence[ExpertNames], rank: int, whole: bool
) -> dict[str, Tensor]:
    """One pair per projection of each expert: ``lora_A [rank, in]``, ``lora_B [out, rank]``.

    Args:
        layers: the update.
        names: of each layer's experts.
        rank: of every projection; smaller updates are filled up with zeros.
        whole: every expert of a layer, and the projections before the down-projections as zeros: servers stack all of
            them and read no layer in which one is missing. Without it, down-projections with an update only.
    """
    tensors: dict[str, Tensor] = {}
    for factors, called in zip(layers, names, strict=True):
        for expert, (b, a) in enumerate(padded(factors, rank)):
            if not whole and expert not in factors.experts:
                continue
            key = f"{PREFIX}{called.module}.{called.down.format(expert=expert)}"
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
            for projection in called.inputs if whole else ():
                key = f"{PREFIX}{called.module}.{projection.format(expert=expert)}"
                tensors[f"{key}.lora_A.weight"] = a.new_zeros(rank, factors.d_model)
                tensors[f"{key}.lora_B.weight"] = a.new_zeros(factors.d_hidden, rank)
    return tensors
