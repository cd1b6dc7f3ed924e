"""EasyEdit's request dicts: made from its parallel lists, and checked before anything is edited."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from easyedit_moe.errors import EditingWarning, RequestError, shown
from easyedit_moe.facts.requests import EditRequest, check_batch, listed_requests, parse_request
from easyedit_moe.facts.texts import checked_text

_SECTIONS = ("locality", "portability")


def requests_from_columns(
    prompts: str | Sequence[str] | None,
    target_new: str | Sequence[str] | None,
    ground_truth: str | Sequence[str] | None,
    target_neg: str | Sequence[str] | None,
    rephrase_prompts: str | Sequence[str] | None,
    locality_inputs: Mapping[str, Mapping[str, Any]] | None,
    portability_inputs: Mapping[str, Mapping[str, Any]] | None,
    subject: str | Sequence[str] | None,
) -> list[dict[str, Any]]:
    """EasyEdit's request dicts from the parallel lists of its ``edit`` and ``batch_edit``; a text is a list of one.

    ``subject`` may be None for methods that do not use it. Groups of locality and portability may be empty: {}, or
    lists of length 0.

    Raises:
        RequestError: lists of different lengths, or inputs that lack 'prompt' or 'ground_truth'.
    """
    count = len(_column("prompts", prompts))
    columns: dict[str, Any] = {"prompt": prompts, "target_new": target_new, "subject": subject}
    columns |= {"ground_truth": ground_truth, "target_neg": target_neg, "rephrase_prompt": rephrase_prompts}
    requests: list[dict[str, Any]] = [{"ground_truth": None, "locality": {}, "portability": {}} for _ in range(count)]
    for name, values in columns.items():
        if values is not None:
            for request, value in zip(requests, _column(name, values, count), strict=True):
                request[name] = value
    for section, inputs in (("locality", locality_inputs), ("portability", portability_inputs)):
        for key, value in _mapping(f"{section}_inputs", inputs).items():
            if _is_empty(value):
                continue
            name = f"{section}_inputs[{key!r}]"
            value = _prompt_and_answer(name, value)
            listed, answers = _column(name, value["prompt"], count), _column(name, value["ground_truth"], count)
            for request, prompt, answer in zip(requests, listed, answers, strict=True):
                if prompt is not None:
                    request[section][key] = {"prompt": prompt, "ground_truth": answer}
    return requests


def _column(name: str, values: Any, count: int | None = None) -> list[Any]:
    listed = _as_list(name, values)
    if count is not None and len(listed) != count:
        raise RequestError(f"{name} has {len(listed)} entries for {count} prompts.")
    return listed


def _as_list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, (bytes, bytearray)):
        raise RequestError(f"{name} must be a text or a list of texts; found {shown(value)}.")
    return [value] if isinstance(value, str) else list(value)


@dataclass(frozen=True)
class HostRequest:
    """One request as EasyEdit has it: the fact, and its flat dict with all that is scored."""

    fact: EditRequest
    record: dict[str, Any]


def checked_batches(batches: Sequence[Sequence[Mapping[str, Any] | EditRequest]]) -> list[list[HostRequest]]:
    """All batches, parsed, once nothing is found wrong with any of them.

    Takes EasyEdit's dicts, ROME's, and `EditRequest` values.

    Raises:
        RequestError: nothing to edit, an unusable request (its number is named), or requests of one batch that are
            the same or conflict.
    """
    if not batches:
        raise RequestError("There is nothing to edit: the list of requests is empty.")
    numbers = itertools.count()
    checked = [[_host_request(next(numbers), record) for record in listed_requests(batch)] for batch in batches]
    with warnings.catch_warnings():
        # The editor checks each batch again when its turn comes, and warns then.
        warnings.simplefilter("ignore", EditingWarning)
        for batch in checked:
            check_batch([request.fact for request in batch])
    return checked


def _host_request(number: int, record: Mapping[str, Any] | EditRequest) -> HostRequest:
    given = dict(record) if isinstance(record, Mapping) else {}
    try:
        fact = parse_request(record)
        request = {**given, **vars(fact), **{name: _groups(name, given.get(name)) for name in _SECTIONS}}
        prompts_of(request)
    except RequestError as error:
        raise RequestError(f"Request {number}: {error}") from error
    return HostRequest(fact, request)


def _groups(section: str, given: Any) -> dict[str, Any]:
    """A request's locality or portability without groups in which nothing is asked, at which EasyEdit fails."""
    return {key: value for key, value in _mapping(section, given).items() if not _is_empty(value)}


def _mapping(name: str, given: Any) -> Mapping[str, Any]:
    """Groups by their names; an empty list, as None, is no group.

    Raises:
        RequestError: something else, or a name that is no text.
    """
    if is_nothing(given):
        return {}
    if not isinstance(given, Mapping):
        raise RequestError(f"'{name}' must be a dict of groups; found {shown(given)}.")
    for key in given:
        checked_text(f"{name}: the name of a group", key)
    return given


def _is_empty(value: Any) -> bool:
    """Whether a group asks nothing: {}, or neither prompts nor answers in it."""
    if not isinstance(value, Mapping):
        return False
    unknown = value.keys() - {"prompt", "ground_truth"}
    return not unknown and all(is_nothing(text) for text in value.values())


def is_nothing(value: Any) -> bool:
    """Whether an argument says as little as None: an empty list, dict or array; an empty text says something."""
    if value is None or isinstance(value, str):
        return value is None
    try:
        return len(value) == 0
    except TypeError:  # a number, or an array without dimensions, which has a length in name only
        return False


def prompts_of(request: Mapping[str, Any]) -> list[tuple[tuple[str, ...], str, str]]:
    """Every prompt of a request by its place in the result, with the answer that is scored.

    Raises:
        RequestError: one that is no text, or groups of another form.
    """
    asked: list[tuple[tuple[str, ...], Any, Any]] = [(("rewrite",), request["prompt"], request["target_new"])]
    rephrase = request.get("rephrase_prompt")
    if not is_nothing(rephrase) and not (isinstance(rephrase, str) and not rephrase):
        asked.append((("rephrase",), rephrase, request["target_new"]))
    for section in _SECTIONS:
        for key, value in _mapping(section, request.get(section)).items():
            name = f"{section}[{key!r}]"
            value = _prompt_and_answer(name, value)
            prompts, answers = _as_list(name, value["prompt"]), _as_list(name, value["ground_truth"])
            if len(prompts) != len(answers):
                raise RequestError(f"{name} has {len(prompts)} prompts, but {len(answers)} answers.")
            asked += [((section, key), p, a) for p, a in zip(prompts, answers, strict=True)]
    for place, prompt, answer in asked:
        for text in (prompt, answer):
            if not isinstance(text, str) or not text.strip():
                raise RequestError(
                    f"{' '.join(place)}: prompts and answers must be texts; found {shown(prompt)}, {shown(answer)}."
                )
            checked_text(" ".join(place), text)
    return asked


def _prompt_and_answer(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not {"prompt", "ground_truth"} <= value.keys():
        raise RequestError(f"{name} must hold 'prompt' and 'ground_truth'; found {shown(value)}.")
    return value
