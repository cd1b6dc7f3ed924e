"""How near to its target a shift of the hidden state at one layer brings a fact, and whether it carries over.

The shift is found as an edit finds its target vectors (`easyedit_moe.targets.search`), at the output of the layer. What
it does to other phrasings of the fact is then seen by adding it at their fact tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.evaluation.means import Mean
from easyedit_moe.facts.records import EvaluationRecord
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.facts.tokens import pad_id
from easyedit_moe.localisation.prompts import paraphrased
from easyedit_moe.moe.capture import capture_facts, inference_mode_of
from easyedit_moe.moe.upper_layers import ShiftedSequence, UpperLayers
from easyedit_moe.targets.search import FactContext, TargetSearch, TargetSettings, TargetVectors, fact_contexts


@dataclass(frozen=True)
class Reachability:
    """What shifts at the output of one layer come to, as means over facts.

    Attributes:
        layer: its index.
        initial_nll, final_nll: mean NLL in nats per token of the new target, without and with the shift, over the
            contexts of an edit.
        worst_nll: the largest final one.
        reached: percent of facts whose new target is then the most likely answer.
        norm: length of the shift.
        relative_norm: that length over the length of the hidden state which is shifted.
        paraphrase_before, paraphrase_nll: NLL of the new target after other phrasings, without and with the shift.
        carried: percent of a fact's other phrasings after which the shift makes the new target more likely than the
            true answer, or, where no true answer is known, the most likely one.
    """

    layer: int
    initial_nll: Mean
    final_nll: Mean
    worst_nll: float
    reached: Mean
    norm: Mean
    relative_norm: Mean
    paraphrase_before: Mean
    paraphrase_nll: Mean
    carried: Mean


Find = Callable[[TargetSearch, Sequence[EditRequest]], TargetVectors]
"""How target vectors are found: `TargetSearch.targets`, or by way of a cache."""


def reachability(
    search: TargetSearch, records: Sequence[EvaluationRecord], find: Find = TargetSearch.find
) -> Reachability:
    """Search the shifts of all records at ``search.layer``, and see what they do to the other phrasings.

    Raises:
        RequestError: a record without a fact token. NumericalError: a loss that is not finite.
    """
    targets = find(search, [record.request for record in records])
    lengths = targets.delta.norm(dim=1)
    before, after, preferred = carried_over(search, records, targets.delta)
    return Reachability(
        search.layer,
        Mean.of(targets.initial_nll.tolist()),
        Mean.of(targets.final_nll.tolist()),
        float(targets.final_nll.max()),
        Mean.of((100 * targets.reached.double()).tolist()),
        Mean.of(lengths.tolist()),
        Mean.of((lengths / _state_norms(search, records)).tolist()),
        Mean.of(before),
        Mean.of(after),
        Mean.of(preferred),
    )


def _state_norms(search: TargetSearch, records: Sequence[EvaluationRecord]) -> Tensor:
    """Length of the hidden state that each record's shift is added to, ``[T]``."""
    settings = search.settings
    places = [fact_contexts(search.tok, r.request, (), settings.fact_token, settings.chat)[0] for r in records]
    ids, facts = [place.ids for place in places], [place.fact for place in places]
    found = capture_facts(search.view, ids, facts, [], [search.layer], pad_id(search.tok), settings.usual_size)
    return found.outputs[search.layer].norm(dim=1).cpu().clamp_min(1e-30)


@dataclass(frozen=True)
class _Asked:
    """An answer after another phrasing: of which record, which of its phrasings, and whether it is the new target."""

    record: int
    phrasing: int
    new: bool
    place: FactContext


def carried_over(
    search: TargetSearch, records: Sequence[EvaluationRecord], delta: Tensor
) -> tuple[list[float], list[float], list[float]]:
    """Per record with other phrasings: NLL of the new target without and with its shift, and percent carried.

    ``delta`` is ``[T, d]``, a shift for each record.
    """
    asked = _questions(search.tok, records, search.settings)
    if not asked:
        return [], [], []
    still = _losses(search, asked, torch.zeros_like(delta))
    moved = _losses(search, asked, delta)
    rows: dict[int, dict[int, dict[bool, int]]] = {}
    for i, one in enumerate(asked):
        rows.setdefault(one.record, {}).setdefault(one.phrasing, {})[one.new] = i
    before, after, preferred = [], [], []
    for phrasings in rows.values():
        new = [answers[True] for answers in phrasings.values()]
        before.append(sum(still[i][0] for i in new) / len(new))
        after.append(sum(moved[i][0] for i in new) / len(new))
        wins = [
            moved[answers[True]][0] < moved[answers[False]][0] if False in answers else moved[answers[True]][1]
            for answers in phrasings.values()
        ]
        preferred.append(100 * sum(wins) / len(wins))
    return before, after, preferred


def _questions(
    tok: PreTrainedTokenizerBase, records: Sequence[EvaluationRecord], settings: TargetSettings
) -> list[_Asked]:
    found = []
    for number, record in enumerate(records):
        for phrasing, request in enumerate(paraphrased(record)):
            answers = [(True, request)]
            if request.ground_truth:
                answers.append((False, EditRequest(request.prompt, request.subject, request.ground_truth)))
            for new, one in answers:
                (place,) = fact_contexts(tok, one, (), settings.fact_token, settings.chat)
                found.append(_Asked(number, phrasing, new, place))
    return found


def _losses(search: TargetSearch, asked: Sequence[_Asked], delta: Tensor) -> list[tuple[float, bool]]:
    """Per question the mean NLL of the answer's tokens under its record's shift, and whether each is the likeliest."""
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].place.ids) + len(asked[i].place.answer))
    found: dict[int, tuple[float, bool]] = {}
    size = search.settings.usual_size
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        places = [asked[i].place for i in chosen]
        owners = torch.tensor([asked[i].record for i in chosen])
        with inference_mode_of(search.view.model):
            upper = UpperLayers(search.view, search.layer, pad_id(search.tok), [_sequence(p) for p in places])
            logits = upper.logits(delta[owners].to(upper.states.device)).cpu()
        labels = torch.tensor([label for place in places for label in place.answer])
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        likeliest, counts = logits.argmax(-1) == labels, [len(place.answer) for place in places]
        parts = zip(chosen, losses.split(counts), likeliest.split(counts), strict=True)
        found.update({i: (float(loss.mean()), bool(best.all())) for i, loss, best in parts})
    return [found[i] for i in range(len(asked))]


def _sequence(place: FactContext) -> ShiftedSequence:
    end = len(place.ids)
    scored = tuple(range(end - 1, end - 1 + len(place.answer)))
    return ShiftedSequence(place.ids + place.answer[:-1], place.fact, scored)
