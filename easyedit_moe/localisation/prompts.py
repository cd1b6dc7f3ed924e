"""The prompts by which facts are located: phrasings, neighbours, their fact tokens, and the answers to trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import RequestError
from easyedit_moe.evaluation.generation import generate_answers
from easyedit_moe.evaluation.scoring import score_targets
from easyedit_moe.facts.records import EvaluationRecord
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.facts.tokens import Prompt, decode, encode_pair, encode_prompt, subject_span

FIRST_TOKENS = 4
"""Tokens that the model writes where its answer is not known."""


@dataclass(frozen=True)
class TracedFact:
    """A fact that the model knows, for causal tracing.

    Attributes:
        ids: of the prompt.
        subject: positions of the first and the last token of the subject.
        fact: position of the fact token.
        answer: ids of the answer that the model gives now.
    """

    ids: tuple[int, ...]
    subject: tuple[int, int]
    fact: int
    answer: tuple[int, ...]


def phrasings(
    tok: PreTrainedTokenizerBase, record: EvaluationRecord, fact_token: str, chat: bool = False
) -> list[Prompt]:
    """The record's own prompt first, then each paraphrase in which a fact token can be found.

    Raises:
        RequestError: the prompt has no fact token.
    """
    request = record.request
    found = [encode_prompt(tok, request.prompt, request.subject, fact_token, chat=chat)]
    for text in record.paraphrases:
        try:
            found.append(encode_prompt(tok, text, request.subject, fact_token, chat=chat))
        except RequestError:  # a paraphrase that does not name the subject
            continue
    return found


def neighbours_alike(
    tok: PreTrainedTokenizerBase, record: EvaluationRecord, fact_token: str, chat: bool = False
) -> list[Prompt]:
    """Neighbours whose fact token is known: those that have the prompt's own wording around another subject.

    With ``fact_token`` "last" all are.
    """
    request, found = record.request, []
    for text in [*(prompt for prompt, _ in record.neighbours), *record.unanswered]:
        subject = None if request.subject is None else other_subject(request.prompt, request.subject, text)
        if subject is None and fact_token != "last":
            continue
        try:
            found.append(encode_prompt(tok, text, subject, fact_token, chat=chat))
        except RequestError:  # what stands in the subject's place is no word of its own
            continue
    return found


def other_subject(prompt: str, subject: str, text: str) -> str | None:
    """What stands in ``text`` where ``prompt`` has its subject; None where the words around it differ."""
    start, end = subject_span(prompt, subject)
    before, after = prompt[:start], prompt[end:]
    if len(text) <= len(before) + len(after) or not (text.startswith(before) and text.endswith(after)):
        return None
    return text[len(before) : len(text) - len(after)].strip() or None


def paraphrased(record: EvaluationRecord) -> list[EditRequest]:
    """The fact in the wording of each paraphrase that names its subject."""
    request, found = record.request, []
    for text in record.paraphrases:
        try:
            found.append(EditRequest(text, request.subject, request.target_new, request.ground_truth))
        except RequestError:
            continue
    return found


def traced_facts(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    records: Sequence[EvaluationRecord],
    fact_token: str,
    chat: bool = False,
) -> list[TracedFact]:
    """The facts of records whose prompt names a subject, each with the answer that the model gives.

    That is the record's true answer where the model gives it, else what the model says first, up to a token that is
    more than blank. A prompt to which it says nothing is left out.
    """
    named = [record.request for record in records if record.request.subject is not None]
    known = _known_answers(model, tok, named, chat)
    asked = [request.prompt for request in named if request.prompt not in known]
    said = generate_answers(model, tok, asked, FIRST_TOKENS, chat) if asked else []
    own = {prompt: _first_words(tok, answer.ids) for prompt, answer in zip(asked, said, strict=True)}
    found = []
    for request in named:
        answer = known.get(request.prompt)
        labels = own.get(request.prompt, ()) if answer is None else _continuation(tok, request, answer, chat)
        if labels:
            found.append(_traced(tok, request, answer, labels, fact_token, chat))
    return found


def _known_answers(
    model: nn.Module, tok: PreTrainedTokenizerBase, requests: Sequence[EditRequest], chat: bool
) -> dict[str, str]:
    """True answers that are the model's own, by prompt."""
    pairs = [(request.prompt, request.ground_truth) for request in requests if request.ground_truth]
    scores = score_targets(model, tok, pairs, chat=chat)
    return {prompt: answer for (prompt, answer), score in zip(pairs, scores, strict=True) if score.exact}


def _first_words(tok: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[int, ...]:
    """The first of some tokens that together are more than blank; none where all are."""
    for count in range(1, len(ids) + 1):
        if decode(tok, ids[:count], skip_special_tokens=True).strip():
            return tuple(ids[:count])
    return ()


def _continuation(tok: PreTrainedTokenizerBase, request: EditRequest, answer: str, chat: bool) -> tuple[int, ...]:
    return tuple(encode_pair(tok, request.prompt, answer, request.subject, chat)[1])


def _traced(
    tok: PreTrainedTokenizerBase,
    request: EditRequest,
    answer: str | None,
    labels: tuple[int, ...],
    fact_token: str,
    chat: bool,
) -> TracedFact:
    def at(place: str) -> Prompt:
        return encode_prompt(tok, request.prompt, request.subject, place, answer, chat)

    first, last = at("subject_first"), at("subject_last")
    fact = len(first.ids) - 1 if fact_token == "last" else at(fact_token).fact
    return TracedFact(first.ids, (first.fact, last.fact), fact, labels)
