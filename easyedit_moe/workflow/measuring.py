"""What a model says and thinks of facts and the prompts by which they are judged; before and after an edit alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

from torch import nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.evaluation.generation import MAX_NEW_TOKENS, Answer, generate_answers
from easyedit_moe.evaluation.scoring import TargetScore, score_targets
from easyedit_moe.facts.records import EvaluationRecord
from easyedit_moe.facts.tokens import decode

Asked = tuple[str, str]
"""A prompt, and the answer whose probability is wanted."""


@dataclass(frozen=True)
class Said:
    """What a model answers to one prompt.

    Attributes:
        answer: by greedy decoding.
        opening: the answer as far as the wanted one is long, in tokens: what follows is not what was asked.
        probability: of the whole wanted answer, teacher-forced: the product over its tokens.
        token_accuracy: share of the wanted answer's tokens that are the most likely ones, teacher-forced.
        first_choice: all of them are, so greedy decoding writes the wanted answer.
    """

    answer: str
    opening: str
    probability: float
    token_accuracy: float
    first_choice: bool


def prompts_of(record: EvaluationRecord) -> dict[str, tuple[Asked, ...]]:
    """All prompts of a record with the answer that is wanted of each, by kind: "fact", "rephrasings", "neighbours" and
    "portability". Neighbours should keep their answer, the others should have the new one or what follows from it.
    """
    request = record.request
    follow = tuple((probe.prompt, probe.answers[0]) for group in record.portability for probe in group.probes)
    return {
        "fact": ((request.prompt, request.target_new),),
        "rephrasings": tuple((prompt, request.target_new) for prompt in record.paraphrases),
        "neighbours": tuple(record.neighbours),
        "portability": follow,
    }


def ask_all(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    asked: Sequence[Asked],
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: bool = False,
    chat: bool = False,
) -> dict[Asked, Said]:
    """What the model says, once per prompt and wanted answer, in a chat or not; raises what the parts raise."""
    pairs = list(dict.fromkeys(asked))
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    answers = generate_answers(model, tok, prompts, max_new_tokens, chat, progress=progress)
    by_prompt = dict(zip(prompts, answers, strict=True))
    scores = score_targets(model, tok, pairs, progress=progress, chat=chat)
    return {pair: _said(tok, by_prompt[pair[0]], score) for pair, score in zip(pairs, scores, strict=True)}


def _said(tok: PreTrainedTokenizerBase, answer: Answer, score: TargetScore) -> Said:
    opening = decode(tok, answer.ids[: len(score.labels)], skip_special_tokens=True).strip()
    return Said(answer.text, opening, exp(-score.nll * len(score.labels)), score.token_accuracy, score.exact)
