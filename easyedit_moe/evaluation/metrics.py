"""Efficacy, generalisation, specificity, utility by the papers' protocols, with intervals.

All numbers are teacher-forced. ``exact_match`` stands beside them: whether free greedy generation after the prompt
writes the new target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import DataError
from easyedit_moe.evaluation.means import mean_of
from easyedit_moe.evaluation.scoring import TargetScore, score_targets
from easyedit_moe.evaluation.summary import Score
from easyedit_moe.facts.records import PROTOCOLS, EvaluationRecord
from easyedit_moe.facts.requests import EditRequest


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
    return changed(request.prompt), mean_of([changed(p) for p in record.paraphrases]), mean_of(kept)


def _judge_tokens(record: EvaluationRecord, scores: _Scores) -> _Row:
    def accuracy(prompt: str) -> float:
        return scores[prompt, record.request.target_new].token_accuracy

    kept = [scores[pair].token_accuracy for pair in record.neighbours]
    return accuracy(record.request.prompt), mean_of([accuracy(p) for p in record.paraphrases]), mean_of(kept)
