"""The keys of all tokens of a forward, as the experts compute them themselves: nothing is computed twice.

Packed experts hand the projections of many tokens to one gating function, whose result is the input of the
down-projections. transformers' default implementation, "grouped_mm", sorts the tokens by expert first; "eager" takes
the experts in increasing order, too. So the collected rows are sorted by expert. That is checked against the key
function before it is relied on; where it does not hold, where gating is written out in place ("eager" in some families)
and for ModuleLists, keys are computed from the hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from easyedit_moe.moe.capture import Routing, hooks, replaced_methods
from easyedit_moe.moe.experts import PackedExperts
from easyedit_moe.moe.ffn_experts import FFNExpert
from easyedit_moe.moe.layers import MoELayer


@contextmanager
def collecting_keys(moe: MoELayer, rows: list[Tensor]) -> Iterator[None]:
    """Inside, what packed experts compute as keys is appended to ``rows`` in the order of computation."""
    if isinstance(moe.experts, FFNExpert) and not moe.experts.sum_in_block:
        width = moe.experts.layout.d_hidden
        with hooks() as handles:
            keep = moe.experts.down.register_forward_pre_hook(lambda _, args: rows.append(args[0].reshape(-1, width)))
            handles.append(keep)
            yield
        return
    if not isinstance(moe.experts, PackedExperts):
        yield
        return
    packed = moe.experts.packed
    if not moe.experts.layout.gated:
        with hooks() as handles:
            if isinstance(packed.act_fn, nn.Module):
                handles.append(packed.act_fn.register_forward_hook(lambda _, __, out: rows.append(out)))
            yield
        return
    plain = packed._apply_gate

    def keeping(value: Tensor) -> Tensor:
        out = plain(value)
        rows.append(out)
        return out

    with replaced_methods({moe.experts.module: keeping}, "_apply_gate"):
        yield


def sorted_keys(moe: MoELayer, routing: Routing) -> tuple[Tensor, Tensor]:
    """Keys ``[S, h]`` of all slots with a non-zero gate, sorted by expert, and how many each expert has ``[E]``.

    Computed from the hidden states, one expert at a time.
    """
    token, slot = torch.nonzero(routing.gate != 0, as_tuple=True)
    chosen = routing.expert[token, slot]
    order = torch.argsort(chosen, stable=True)
    counts = torch.bincount(chosen, minlength=moe.experts.layout.num_experts)
    hidden = routing.inputs(token[order], slot[order])
    keys = hidden.new_empty(len(hidden), moe.experts.layout.d_hidden)
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            keys[start : start + count] = moe.experts.expert_key(hidden[start : start + count], expert).to(keys.dtype)
        start += count
    return keys, counts


def own_keys(moe: MoELayer, routing: Routing, rows: list[Tensor]) -> tuple[Tensor, Tensor] | None:
    """As `sorted_keys`, from collected ``rows``; None where they do not stand for every slot."""
    slots = routing.expert.numel()
    if not rows or sum(len(r) for r in rows) != slots or not bool((routing.gate != 0).all()):
        return None
    counts = torch.bincount(routing.expert.reshape(-1), minlength=moe.experts.layout.num_experts)
    return rows[0] if len(rows) == 1 else torch.cat(rows), counts


def are_sorted_by_expert(moe: MoELayer, routing: Routing, keys: Tensor, counts: Tensor) -> bool:
    """Whether a few experts' share of ``keys [S, h]`` is what the key function says, whatever the order within."""
    hit = torch.nonzero(counts).squeeze(1)
    ends = counts.cumsum(0)
    for expert in {int(hit[0]), int(hit[len(hit) // 2]), int(hit[-1])}:
        found = keys[int(ends[expert] - counts[expert]) : int(ends[expert])].float()
        rows = (routing.expert == expert).any(1)
        wanted = moe.experts.expert_key(routing.hidden[rows], expert).float()
        tolerance = 1e-3 if keys.dtype == torch.float32 else 0.05
        if len(found) != len(wanted):
            return False
        found, wanted = found.T @ found, wanted.T @ wanted
        # Keys that overflow are reported where sums are checked.
        if torch.isfinite(wanted).all() and (found - wanted).norm() > tolerance * wanted.norm():
            return False
    return True
