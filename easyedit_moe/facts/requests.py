"""Edit requests: from host dicts or dataset records to validated values."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from easyedit_moe.errors import EditingWarning, RequestError, shown
from easyedit_moe.facts.iterating import is_iterable
from easyedit_moe.facts.subjects import mentions
from easyedit_moe.facts.texts import check_encodable, checked_text, same_text
from easyedit_moe.facts.tokens import subject_span


@dataclass(frozen=True)
class EditRequest:
    """One fact to write: after ``prompt`` the model should say ``target_new``.

    ``subject`` occurs in the prompt, or is None where none is given, which only methods take that do not use it;
    ``ground_truth`` is what the model said before, where known.

    Raises:
        RequestError: on construction, for a field that is no text or blank, or a subject that is not in the prompt.
    """

    prompt: str
    subject: str | None
    target_new: str
    ground_truth: str | None = None

    def __post_init__(self) -> None:
        checked_text("prompt", self.prompt)
        checked_text("target_new", self.target_new)
        if self.ground_truth is not None:
            if not isinstance(self.ground_truth, str):
                raise RequestError(f"'ground_truth' must be a string or None; found {shown(self.ground_truth)}.")
            check_encodable("ground_truth", self.ground_truth)
        if self.subject is not None:
            subject_span(self.prompt, checked_text("subject", self.subject))

    @property
    def named_subject(self) -> str:
        """The subject, for code that can't do without.

        Raises:
            RequestError: the fact has none.
        """
        if self.subject is None:
            raise RequestError(f"The subject of {self.prompt!r} is needed, and the fact came without one.")
        return self.subject


def parse_request(record: Mapping[str, Any] | EditRequest) -> EditRequest:
    """One request from EasyEdit's dict (prompt, subject, target_new, ground_truth) or ROME's (prompt with ``{}``,
    targets as ``{"str": ...}``, also nested under "requested_rewrite").

    Raises:
        RequestError: a missing or blank field other than the subject, which may be absent or None, or a subject that
            is not in the prompt.
    """
    if isinstance(record, EditRequest):
        return record
    if not isinstance(record, Mapping):
        raise RequestError(f"A request must be a dict; found {type(record).__name__}: {shown(record)}.")
    rewrite = record.get("requested_rewrite", record)
    if not isinstance(rewrite, Mapping):
        raise RequestError(f"'requested_rewrite' must be a dict; found {shown(rewrite)}.")
    prompt = _required_text(rewrite, "prompt")
    subject = None if rewrite.get("subject") is None else _required_text(rewrite, "subject")
    target = _required_text(rewrite, "target_new")
    truth = rewrite.get("ground_truth", rewrite.get("target_true"))
    if isinstance(truth, Sequence) and not isinstance(truth, str):
        truth = truth[0] if truth else None
    if isinstance(truth, Mapping):
        truth = truth.get("str")
    # Braces are text; a slot they are in ROME's layout, and where the prompt would not name its subject without them.
    raw = rewrite is not record or isinstance(rewrite.get("target_new"), Mapping)
    slot = subject is not None and (raw or not mentions(prompt, subject))
    filled = prompt.replace("{}", subject) if slot and subject is not None else prompt
    return EditRequest(filled, subject, target, truth)


def listed_requests(records: Any) -> list[Any]:
    """Requests, whatever they come in: a list, a tuple or an iterator, which is used up; what is in it is not checked.

    Raises:
        RequestError: a single request, a text, or nothing that can be iterated over.
    """
    if isinstance(records, (Mapping, EditRequest, str, bytes)) or not is_iterable(records):
        raise RequestError(f"Requests must be a list; found {type(records).__name__}. Wrap a single request in [ ].")
    return list(records)


def parse_requests(records: Iterable[Mapping[str, Any] | EditRequest]) -> list[EditRequest]:
    """All requests of one batch, checked against each other; see `check_batch` for its warning.

    Raises:
        RequestError: no request, one that is unusable, one given twice, or two with different targets for one prompt.
    """
    requests: list[EditRequest] = []
    for number, record in enumerate(listed_requests(records)):
        try:
            requests.append(parse_request(record))
        except RequestError as error:
            raise RequestError(f"Request {number}: {error}") from error
    check_batch(requests)
    return requests


def check_batch(requests: Sequence[EditRequest]) -> None:
    """Check the requests of one batch against each other; what is wrong with a single one was found when it was made.

    Prompts and targets are compared as `same_text` has them, so spaces and ways to write a letter make no other fact.

    Warns (`EditingWarning`) where a target equals the ground truth.

    Raises:
        RequestError: not a list of `EditRequest` values, no request, one given twice, or two with different targets
            for one prompt.
    """
    if isinstance(requests, (EditRequest, str)) or not isinstance(requests, Sequence):
        raise RequestError(f"Requests must be a list; found {type(requests).__name__}. Wrap a single request in [ ].")
    if not requests:
        raise RequestError("There is nothing to edit: the list of requests is empty.")
    seen: dict[str, tuple[int, str]] = {}
    for number, request in enumerate(requests):
        if not isinstance(request, EditRequest):
            raise RequestError(
                f"Request {number}: an editor takes EditRequest values; found {type(request).__name__}. Read dicts "
                "with easyedit_moe.facts.requests.parse_requests first."
            )
        prompt = same_text(request.prompt)
        if prompt in seen:
            other, target = seen[prompt]
            if same_text(target) == same_text(request.target_new):
                raise RequestError(f"Requests {other} and {number} are the same: {request.prompt!r} -> {target!r}.")
            raise RequestError(
                f"Requests {other} and {number} conflict: {request.prompt!r} -> {target!r} and {request.target_new!r}. "
                "Keep one, or edit them in successive batches, where the later one wins."
            )
        seen[prompt] = (number, request.target_new.strip())
        if request.ground_truth is not None and request.ground_truth.strip() == request.target_new.strip():
            warnings.warn(
                f"Request {number}: the target {request.target_new!r} equals the ground truth; nothing is to change.",
                EditingWarning,
                stacklevel=2,
            )


def _required_text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    return checked_text(name, value.get("str") if isinstance(value, Mapping) else value)
