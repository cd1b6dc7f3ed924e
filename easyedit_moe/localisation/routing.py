"""How alike the routed expert sets of fact tokens are: between phrasings of one fact, to neighbours, to other facts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from easyedit_moe.evaluation.means import Mean
from easyedit_moe.facts.records import EvaluationRecord
from easyedit_moe.facts.tokens import Prompt, collate, pad_id
from easyedit_moe.localisation.prompts import neighbours_alike, phrasings
from easyedit_moe.moe.capture import Routing, hooks, inference_mode_of, read_routing, run, stop_after
from easyedit_moe.moe.layers import MoELayer, MoELayerView


@dataclass(frozen=True)
class RoutingAlikeness:
    """Mean Jaccard similarity, in percent, of a fact token's routed expert set with others, at one layer.

    Attributes:
        layer: its index.
        phrasings: to the fact token of each paraphrase.
        neighbours: to that of each neighbour whose fact token is known.
        others: to that of the other facts.
        experts: how many different experts the fact tokens are routed to.
    """

    layer: int
    phrasings: Mean
    neighbours: Mean
    others: Mean
    experts: int


def routing_alikeness(
    view: MoELayerView,
    tok: PreTrainedTokenizerBase,
    records: Sequence[EvaluationRecord],
    layers: Sequence[int],
    fact_token: str,
    chat: bool = False,
    batch_size: int = 64,
) -> list[RoutingAlikeness]:
    """One value per layer; a mean is over facts, each of which counts once however many prompts it has.

    Raises:
        RequestError: a prompt without a fact token. LayerError: a layer that is not one of experts.
    """
    view.require(layers)
    own = [phrasings(tok, record, fact_token, chat) for record in records]
    near = [neighbours_alike(tok, record, fact_token, chat) for record in records]
    prompts = [prompt for group in (*own, *near) for prompt in group]
    picked = fact_experts(view, prompts, layers, pad_id(tok), batch_size)
    return [_alikeness(layer, picked[layer], [len(g) for g in own], [len(g) for g in near]) for layer in layers]


def fact_experts(
    view: MoELayerView, prompts: Sequence[Prompt], layers: Sequence[int], pad: int, batch_size: int = 64
) -> dict[int, Tensor]:
    """Per layer, ``[T, E]`` bool: the experts that each prompt's fact token is routed to, with a gate that is not 0."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    out = {n: torch.zeros(len(prompts), view.layers[n].experts.layout.num_experts, dtype=torch.bool) for n in layers}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([prompts[i].ids for i in chosen], pad)
        flat = torch.arange(len(chosen)) * batch.ids.shape[1] + torch.tensor([prompts[i].fact for i in chosen])
        with inference_mode_of(view.model), hooks() as handles:
            for layer in layers:
                receive = _marker(out[layer], torch.tensor(chosen), flat)
                handles.append(read_routing(view.layers[layer], receive))
            handles.append(stop_after(_last(view, layers).layer))
            run(view.model, batch)
    return out


def _last(view: MoELayerView, layers: Sequence[int]) -> MoELayer:
    return view.layers[max(layers)]


def _marker(out: Tensor, rows: Tensor, flat: Tensor) -> Callable[[Routing], None]:
    def mark(routing: Routing) -> None:
        expert, gate = (value[flat.to(value.device)].cpu() for value in (routing.expert, routing.gate))
        token, slot = torch.nonzero(gate, as_tuple=True)
        out[rows[token], expert[token, slot]] = True

    return mark


def jaccard(one: Tensor, other: Tensor) -> Tensor:
    """Jaccard similarity of expert sets ``[..., E]`` bool, ``[...]`` in [0, 1]; two empty sets are not alike."""
    shared, union = (one & other).sum(-1).double(), (one | other).sum(-1).double()
    return shared / union.clamp_min(1)


def _alikeness(layer: int, picked: Tensor, own: Sequence[int], near: Sequence[int]) -> RoutingAlikeness:
    groups = picked.split([*own, *near])
    phrased, close = groups[: len(own)], groups[len(own) :]
    first = torch.stack([group[0] for group in phrased])
    others = []
    for i in range(len(first)):
        rest = torch.cat([first[:i], first[i + 1 :]])
        others += _percent(first[i], rest)
    return RoutingAlikeness(
        layer,
        Mean.of([value for group in phrased for value in _percent(group[0], group[1:])]),
        Mean.of([value for one, group in zip(first, close, strict=True) for value in _percent(one, group)]),
        Mean.of(others),
        int(torch.cat(phrased).any(0).sum()),
    )


def _percent(one: Tensor, group: Tensor) -> list[float]:
    """The mean similarity of a set to those of a group, as a list of one value; empty for an empty group."""
    return [float(100 * jaccard(one, group).mean())] if len(group) else []
