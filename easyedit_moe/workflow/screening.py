"""Which facts of a file a method can edit; each other one with its reason, so that it does not stop the rest."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.editors import Editor
from easyedit_moe.errors import DataError, EditingWarning, RequestError
from easyedit_moe.evaluation.context import check_fit
from easyedit_moe.facts.anchors import NO_ANCHOR, SubjectMatcher
from easyedit_moe.facts.chat import user_turn, writes_the_date
from easyedit_moe.facts.records import EvaluationRecord, FactSet
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.facts.tokens import encode_context, encode_pair, encode_prompt
from easyedit_moe.hparams import MEMoEHyperParams, MoEHyperParams
from easyedit_moe.workflow.measuring import prompts_of


@dataclass(frozen=True)
class Refused:
    """A fact that is not edited.

    Attributes:
        number: of the record or line, as ``unit`` of the facts counts.
        reason: why, and what to do.
    """

    number: int
    reason: str


@dataclass(frozen=True)
class Screened:
    """What can be edited.

    Attributes:
        records: with the prompts to judge by.
        numbers: of each record in its file.
        refused: all others, by number.
        unit: what the numbers count: "record" or "line".
    """

    records: tuple[EvaluationRecord, ...]
    numbers: tuple[int, ...]
    refused: tuple[Refused, ...]
    unit: str

    @property
    def requests(self) -> list[EditRequest]:
        """The edits."""
        return [record.request for record in self.records]


def screen(facts: FactSet, editor: Editor, tok: PreTrainedTokenizerBase, strict: bool = False) -> Screened:
    """The facts that ``editor`` can take, by what can be known without a forward.

    Raises:
        DataError: none is left; with ``strict``, any is refused.
    """
    kept: list[tuple[int, EvaluationRecord]] = []
    refused = [Refused(number, reason) for number, reason in facts.skipped]
    matcher = _matcher(facts, editor, tok)
    for number, record in zip(facts.numbers, facts.facts, strict=True):
        try:
            _check(record.request, editor, tok, matcher)
        except RequestError as error:
            refused.append(Refused(number, str(error)))
        else:
            kept.append((number, record))
    return _screened(kept, refused, facts.unit, editor, strict)


def fitting(
    screened: Screened, editor: Editor, model: nn.Module, tok: PreTrainedTokenizerBase, strict: bool = False
) -> Screened:
    """The facts that fit the model's context with all their prompts; nothing is computed.

    Raises:
        DataError: as `screen`.
    """
    kept: list[tuple[int, EvaluationRecord]] = []
    refused = list(screened.refused)
    for number, record in zip(screened.numbers, screened.records, strict=True):
        try:
            editor.check_requests(model, tok, [record.request])
            asked = [pair for pairs in prompts_of(record).values() for pair in pairs]
            check_fit(model, tok, asked, editor.hparams.chat)
        except RequestError as error:
            refused.append(Refused(number, str(error)))
        else:
            kept.append((number, record))
    return _screened(kept, refused, screened.unit, editor, strict)


def _screened(
    kept: list[tuple[int, EvaluationRecord]], refused: list[Refused], unit: str, editor: Editor, strict: bool
) -> Screened:
    refused.sort(key=lambda one: one.number)
    if refused and (strict or not kept):
        first = f"{unit} {refused[0].number}: {refused[0].reason}"
        what = "strict allows none" if kept else "no fact is left"
        raise DataError(f"{len(refused)} facts can't be edited by {editor.method}, and {what}; the first, {first}")
    return Screened(tuple(r for _, r in kept), tuple(n for n, _ in kept), tuple(refused), unit)


def check_chat(hparams: MoEHyperParams, tok: PreTrainedTokenizerBase) -> None:
    """Refuse a chat with a tokenizer that has no usable template, and warn where it writes the date.

    Raises:
        RequestError: see `easyedit_moe.facts.chat.user_turn`.
    """
    if hparams.chat:
        user_turn(tok)
        if writes_the_date(tok):
            warnings.warn(
                "The model's chat template writes today's date into every prompt, so the edit is made on a prompt that "
                "is another one tomorrow; the report holds the text. Ask on another day whether the edit holds.",
                EditingWarning,
                stacklevel=3,
            )


def fact_set(facts: Sequence[EvaluationRecord | EditRequest]) -> FactSet:
    """Facts that come from Python rather than from a file; numbers count from 0."""
    records = [EvaluationRecord(fact, (), ()) if isinstance(fact, EditRequest) else fact for fact in facts]
    truth = bool(records) and all(record.request.ground_truth for record in records)
    return FactSet(tuple(records), tuple(range(len(records))), "counterfact" if truth else "token_accuracy")


def _matcher(facts: FactSet, editor: Editor, tok: PreTrainedTokenizerBase) -> SubjectMatcher | None:
    """By what MEMoE will find the subjects of all facts; None for other methods, and where it uses no anchors."""
    if not isinstance(editor.hparams, MEMoEHyperParams) or not editor.hparams.use_anchors:
        return None
    subjects = [record.request.subject for record in facts.facts]
    return SubjectMatcher(tok, tuple(dict.fromkeys(subject for subject in subjects if subject)))


def _check(request: EditRequest, editor: Editor, tok: PreTrainedTokenizerBase, matcher: SubjectMatcher | None) -> None:
    """RequestError where an editor would refuse this fact."""
    editor.check_subjects([request])
    place, chat = getattr(editor.hparams, "fact_token", None), editor.hparams.chat
    if place is not None and (request.subject is not None or editor.needs_subject()):
        encode_prompt(tok, request.prompt, request.subject, place, request.target_new, chat)
    else:
        encode_pair(tok, request.prompt, request.target_new, chat=chat)
    if matcher is not None:
        last = matcher.anchors(encode_context(tok, request.prompt, chat))[-1]
        found = None if last == NO_ANCHOR else matcher.subjects[last]
        if found != request.subject:
            seen = "no subject" if found is None else f"the subject of another fact, {found!r}, as the last one"
            raise RequestError(f"{request.prompt!r} should name {request.subject!r}, but {seen} is found in it.")
