"""Routing similarity: how alike the routed expert sets are before and after edits, by layer and window of layers.

As MoEEdit (arXiv 2602.10965) and MoTE (2605.16686) report it: at a prompt's last token, the Jaccard similarity of its
top-K expert sets, averaged over prompts, then over the layers of an early, a middle and a late window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import RequestError
from easyedit_moe.evaluation.means import mean_of
from easyedit_moe.facts.tokens import collate, encode_context, pad_id
from easyedit_moe.moe.capture import Routing, hooks, inference_mode_of, read_routing, run
from easyedit_moe.moe.layers import MoELayerView

WINDOWS: Mapping[int, tuple[tuple[int, int], ...]] = {
    48: ((11, 20), (21, 30), (31, 40)),
    40: ((11, 20), (21, 30), (31, 40)),
    24: ((5, 9), (10, 14), (15, 19)),
}
"""Number of layers -> first and last layer of the papers' windows: Qwen3-30B-A3B, Qwen3.6-35B-A3B, GPT-OSS-20B."""
NAMES = ("early", "middle", "late")
TOKENS = ("last", "all")
_DEEP = 48


@dataclass(frozen=True)
class RoutingSnapshot:
    """Experts picked for tokens of some prompts: per MoE layer ``[N, E]`` bool, and the model's number of layers."""

    picked: dict[int, Tensor]
    num_layers: int


def routing_windows(num_layers: int) -> tuple[tuple[int, int], ...]:
    """First and last layer of the early, middle and late window of a model.

    The papers' own for the papers' depths; for others the same fractions of the depth as in Qwen3-30B-A3B, 11 to 20, 21
    to 30 and 31 to 40 of 48, whose edges are rounded down: each window begins where the one before ends.
    """
    if num_layers in WINDOWS:
        return WINDOWS[num_layers]
    edges = [num_layers * layer // _DEEP for layer in (11, 21, 31, 41)]
    return tuple((first, max(first, after - 1)) for first, after in pairwise(edges))


def routing_snapshot(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int = 64,
    chat: bool = False,
    tokens: str = "last",
) -> RoutingSnapshot:
    """The top-K expert sets at every MoE layer.

    Args:
        model: with experts that can be read.
        tok: its tokenizer.
        prompts: texts, or with ``chat`` the user's turns in the tokenizer's template.
        batch_size: prompts per forward.
        chat: see `easyedit_moe.evaluation.metrics.evaluate`.
        tokens: "last" of each prompt (row n is prompt n), or "all" of them.

    Raises:
        RequestError: no such ``tokens``.
    """
    if tokens not in TOKENS:
        raise RequestError(f"tokens must be {' or '.join(TOKENS)}; found {tokens!r}.")
    view = MoELayerView(model)
    sequences = [encode_context(tok, prompt, chat) for prompt in prompts]
    parts: dict[int, list[Tensor]] = {index: [] for index in view.layers}
    real: list[Tensor] = []

    def receive(index: int, experts: int) -> Callable[[Routing], None]:
        def keep(routing: Routing) -> None:
            rows = real[-1].to(routing.expert.device)
            expert, gate = routing.expert[rows], routing.gate[rows]
            token, slot = torch.nonzero(gate, as_tuple=True)
            picked = torch.zeros(len(rows), experts, dtype=torch.bool, device=rows.device)
            picked[token, expert[token, slot]] = True
            parts[index].append(picked.cpu())

        return keep

    with inference_mode_of(model), hooks() as handles:
        for index, moe in view.layers.items():
            handles.append(read_routing(moe, receive(index, moe.experts.layout.num_experts)))
        for start in range(0, len(sequences), batch_size):
            batch = collate(sequences[start : start + batch_size], pad_id(tok))
            real.append(_places(batch.mask.cpu(), tokens))
            run(model, batch)
    picked = {index: torch.cat(chunks) for index, chunks in parts.items()}
    return RoutingSnapshot(picked, view.num_layers)


def _places(mask: Tensor, tokens: str) -> Tensor:
    """Where in the flattened ``[B * S]`` batch the tokens are that count."""
    if tokens == "all":
        return torch.nonzero(mask.reshape(-1)).squeeze(1)
    width = mask.shape[1]
    last = width - 1 - mask.int().flip(1).argmax(1)
    return torch.arange(len(mask)) * width + last


def routing_similarity(before: RoutingSnapshot, after: RoutingSnapshot) -> dict[str, Any]:
    """Mean Jaccard similarity of the expert sets, in percent.

    Returns:
        "mean" over all MoE layers; "early", "middle" and "late" over those of each window (None where it has none);
        "windows": their first and last layers; "per_layer": of each layer.
    """
    per_layer = {}
    for index, old in before.picked.items():
        new = after.picked[index]
        shared, union = (old & new).sum(1).double(), (old | new).sum(1).double()
        per_layer[index] = float(100 * (shared / union.clamp_min(1)).mean())
    windows = dict(zip(NAMES, routing_windows(before.num_layers), strict=True))
    means = {
        name: mean_of([value for layer, value in per_layer.items() if first <= layer <= last])
        for name, (first, last) in windows.items()
    }
    return {
        "mean": mean_of(list(per_layer.values())),
        **means,
        "windows": {name: list(ends) for name, ends in windows.items()},
        "per_layer": per_layer,
    }
