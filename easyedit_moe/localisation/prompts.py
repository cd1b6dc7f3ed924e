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
from easyedit_moe.facts.tokens import Prompt, encode_pair, encode_prompt, subject_span

ANSWER_TOKENS = 8
"""Most tokens of an answer that the model gives by itself."""


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

    That is the record's true answer where it is the most likely one, else the first line that the model writes. A
    prompt to which it says nothing is left out.
    """
    named = [record.request for record in records if record.request.subject is not None]
    known = _known_answers(model, tok, named, chat)
    asked = [request.prompt for request in named if request.prompt not in known]
    said = generate_answers(model, tok, asked, ANSWER_TOKENS, chat) if asked else []
    for prompt, answer in zip(asked, said, strict=True):
        line = (answer.text.strip().splitlines() or [""])[0].strip()
        if line:
            known[prompt] = line
    return [
        _traced(tok, request, known[request.prompt], fact_token, chat) for request in named if request.prompt in known
    ]


def _known_answers(
    model: nn.Module, tok: PreTrainedTokenizerBase, requests: Sequence[EditRequest], chat: bool
) -> dict[str, str]:
    """True answers that are the model's own, by prompt."""
    pairs = [(request.prompt, request.ground_truth) for request in requests if request.ground_truth]
    scores = score_targets(model, tok, pairs, chat=chat)
    return {prompt: answer for (prompt, answer), score in zip(pairs, scores, strict=True) if score.exact}


def _traced(tok: PreTrainedTokenizerBase, request: EditRequest, answer: str, fact_token: str, chat: bool) -> TracedFact:
    def at(place: str) -> Prompt:
        return encode_prompt(tok, request.prompt, request.subject, place, answer, chat)

    first, last, fact = (at(place) for place in ("subject_first", "subject_last", fact_token))
    labels = encode_pair(tok, request.prompt, answer, request.subject, chat)[1]
    return TracedFact(first.ids, (first.fact, last.fact), _shared(fact, first), tuple(labels))


def _shared(fact: Prompt, other: Prompt) -> int:
    """The fact token among the ids of a prompt that was divided from its answer with the subject in mind."""
    return fact.fact if fact.ids == other.ids else len(other.ids) - 1
