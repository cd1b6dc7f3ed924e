"""Efficacy, generalisation, specificity, utility by the papers' protocols, with intervals; routing similarity.

All numbers are teacher-forced. ``exact_match`` stands beside them: whether free greedy generation after the prompt
writes the new target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import DataError
from easyedit_moe.evaluation.scoring import TargetScore, score_targets
from easyedit_moe.evaluation.summary import Score
from easyedit_moe.facts.records import PROTOCOLS, EvaluationRecord
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.facts.tokens import collate, encode_context, pad_id
from easyedit_moe.moe.capture import Routing, hooks, inference_mode_of, read_routing, run
from easyedit_moe.moe.layers import MoELayerView


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of one model on one set of records.

    ``utility`` is the mean of the other three per record; ``exact_match`` is free greedy generation of the new target.
    """

    protocol: str
    efficacy: Score
    generalisation: Score
    specificity: Score
    utility: Score
    exact_match: Score

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def evaluate(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    records: Sequence[EvaluationRecord],
    protocol: str = "counterfact",
    batch_size: int = 128,
    max_length: int | None = None,
    progress: bool = False,
    chat: bool = False,
) -> EvaluationResult:
    """Score all records on the model as it is now.

    "counterfact": efficacy is P(new) > P(true) after the prompt, generalisation the same after paraphrases, specificity
    P(true) > P(new) after neighbourhood prompts; probabilities are per-token geometric means, as in ROME and MEMIT.
    All others: token accuracy of the new target after the prompt and the paraphrases, and of the true answer after
    prompts that the edit does not concern; which answer that is, and how they are asked, the records say (see
    `easyedit_moe.facts.records.PROTOCOLS`). Portability groups are not scored here. With ``chat`` every
    prompt is the user's turn in the tokenizer's template.

    Raises:
        DataError: no record, or an unknown protocol. RequestError: ``chat`` without a template.
    """
    if protocol not in PROTOCOLS:
        raise DataError(f"protocol must be one of {', '.join(PROTOCOLS)}; found {protocol!r}.")
    if not records:
        raise DataError("There are no records to evaluate.")
    asked: list[tuple[str, str]] = []
    for record in records:
        asked += _pairs(record, protocol)
    unique = list(dict.fromkeys(asked))
    scores = dict(zip(unique, score_targets(model, tok, unique, batch_size, max_length, progress, chat), strict=True))
    judge = _judge_counterfact if protocol == "counterfact" else _judge_tokens
    rows = [judge(record, scores) for record in records]
    exact = [float(scores[record.request.prompt, record.request.target_new].exact) for record in records]
    efficacy, generalisation, specificity = (Score.of([row[i] for row in rows]) for i in range(3))
    judged = [[value for value in row if value is not None] for row in rows]  # efficacy always is one
    utility = Score.of([sum(values) / len(values) for values in judged])
    return EvaluationResult(protocol, efficacy, generalisation, specificity, utility, Score.of(exact))


def _pairs(record: EvaluationRecord, protocol: str) -> list[tuple[str, str]]:
    request = record.request
    targets = [request.target_new]
    if protocol == "counterfact":
        targets.append(_true_answer(request))
    pairs = [(prompt, target) for prompt in (request.prompt, *record.paraphrases) for target in targets]
    for prompt, answer in record.neighbours:
        pairs.append((prompt, answer))
        if protocol == "counterfact":
            pairs.append((prompt, request.target_new))
    return pairs


def _true_answer(request: EditRequest) -> str:
    """What the new answer is compared with; every record whose layout asks for "counterfact" has it."""
    return cast(str, request.ground_truth)


_Scores = dict[tuple[str, str], TargetScore]
_Row = tuple[float, float | None, float | None]


def _judge_counterfact(record: EvaluationRecord, scores: _Scores) -> _Row:
    request = record.request
    true = _true_answer(request)

    def changed(prompt: str) -> float:
        return float(scores[prompt, request.target_new].nll < scores[prompt, true].nll)

    kept = [float(scores[p, answer].nll < scores[p, request.target_new].nll) for p, answer in record.neighbours]
    return changed(request.prompt), _mean([changed(p) for p in record.paraphrases]), _mean(kept)


def _judge_tokens(record: EvaluationRecord, scores: _Scores) -> _Row:
    def accuracy(prompt: str) -> float:
        return scores[prompt, record.request.target_new].token_accuracy

    kept = [scores[pair].token_accuracy for pair in record.neighbours]
    return accuracy(record.request.prompt), _mean([accuracy(p) for p in record.paraphrases]), _mean(kept)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class RoutingSnapshot:
    """Experts picked for every token of some prompts: per MoE layer, ``[N, E]`` bool."""

    picked: dict[int, Tensor]


def routing_snapshot(
    model: nn.Module, tok: PreTrainedTokenizerBase, prompts: Sequence[str], batch_size: int = 64, chat: bool = False
) -> RoutingSnapshot:
    """The top-K expert sets of every token of ``prompts``, at every MoE layer; see `evaluate` for ``chat``."""
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
            real.append(torch.nonzero(batch.mask.reshape(-1)).squeeze(1))
            run(model, batch)
    return RoutingSnapshot({index: torch.cat(chunks) for index, chunks in parts.items()})


def routing_similarity(before: RoutingSnapshot, after: RoutingSnapshot) -> dict[str, Any]:
    """Mean Jaccard similarity of the expert sets, in percent: per layer, per third of the layers, and overall."""
    per_layer = {}
    for index, old in before.picked.items():
        new = after.picked[index]
        shared, union = (old & new).sum(1).float(), (old | new).sum(1).float()
        per_layer[index] = float(100 * (shared / union.clamp_min(1)).mean())
    values = list(per_layer.values())
    n = len(values)
    cuts = [0, max(1, round(n / 3)), max(1, round(2 * n / 3)), n]
    windows = {
        name: _mean(values[a:b]) for name, a, b in zip(("early", "middle", "late"), cuts, cuts[1:], strict=False)
    }
    return {"mean": _mean(values), **windows, "per_layer": per_layer}
