"""Records to judge by, and facts to edit, from files; their layout is recognised by their keys."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from easyedit_moe import factworld
from easyedit_moe.errors import DataError, EditingWarning, RequestError, did_you_mean
from easyedit_moe.facts.records.benchmarks import parse_cknowedit, parse_hallueditbench, parse_ultraeditbench
from easyedit_moe.facts.records.columns import is_columns, parse_columns, unknown_columns, unknown_message
from easyedit_moe.facts.records.counterfact import parse_rome_counterfact
from easyedit_moe.facts.records.files import Content, read_file
from easyedit_moe.facts.records.knowedit import (
    LOCALITY,
    is_sanitation,
    parse_knowedit,
    parse_sanitation,
    sanitation_items,
)
from easyedit_moe.facts.records.mquake import mquake_items, parse_mquake
from easyedit_moe.facts.records.record import EvaluationRecord, FactSet, Parsed, RecordSet, absent
from easyedit_moe.facts.records.rippleedits import parse_rippleedits
from easyedit_moe.facts.records.unstructured import is_akew, parse_akew, parse_unkebench
from easyedit_moe.facts.records.wikibigedit import parse_wikibigedit
from easyedit_moe.facts.records.zsre import parse_zsre, parse_zsre_alternative
from easyedit_moe.facts.texts import same_text
from easyedit_moe.storage.files import is_file, path_of

Reasons = tuple[tuple[int, str], ...]
SHOWN = 5  # problems that an error lists
NEUTRAL = "neutral"
"""Name of the bundled facts about the real world, made for this project, by which any model can be located."""


@dataclass(frozen=True)
class Layout:
    """One way in which records are written.

    Attributes:
        protocol: how they are judged.
        parse: reads one.
        judged_by: keys without which one can be edited, but not judged as the benchmark does.
    """

    protocol: str
    parse: Callable[[Mapping[str, Any]], Parsed]
    judged_by: tuple[str, ...] = ()


ROME = Layout("counterfact", parse_rome_counterfact, ("neighborhood_prompts", "paraphrase_prompts"))
COLUMNS = Layout("counterfact", parse_columns)
ZSRE = Layout("zsre", parse_zsre, ("rephrase", "loc", "loc_ans"))
ZSRE_ALTERNATIVE = replace(ZSRE, protocol="zsre-alternative", parse=parse_zsre_alternative)
KNOWEDIT = Layout("token_accuracy", parse_knowedit)
MQUAKE = Layout("token_accuracy", parse_mquake)
RIPPLEEDITS = Layout("token_accuracy", parse_rippleedits)
UNKEBENCH = Layout("unstructured", parse_unkebench)
AKEW = Layout("unstructured", parse_akew)
HALLUEDITBENCH = Layout("token_accuracy", parse_hallueditbench)
ULTRAEDITBENCH = Layout("token_accuracy", parse_ultraeditbench)
CKNOWEDIT = Layout("token_accuracy", parse_cknowedit)
WIKIBIGEDIT = Layout("token_accuracy", parse_wikibigedit)
SANITATION = Layout("token_accuracy", parse_sanitation)


def _other_protocols(layout: Layout) -> tuple[Layout, ...]:
    """A layout as each protocol reads it that may be asked for instead of its own."""
    if layout in (ZSRE, ZSRE_ALTERNATIVE):
        return (ZSRE, ZSRE_ALTERNATIVE)
    if layout is AKEW:  # its structured edits, which are those of CounterFact
        return (replace(ROME, judged_by=()),)
    return (replace(layout, protocol="token_accuracy"),) if layout.protocol == "counterfact" else ()


def load_records(source: str | Path, protocol: str | None = None) -> RecordSet:
    """Read "factworld", "factworld-easyedit", "neutral" or a file of records: .json, .jsonl, .csv or .tsv, in UTF-8.

    Known layouts, with the keys they need (the module of each says which more it reads):

    - columns, of a table or of dicts: ``prompt``, ``target_new`` and mostly ``subject``, as EasyEdit's CounterFact;
    - ROME's counterfact.json and multi_counterfact.json: ``requested_rewrite``, ``paraphrase_prompts``,
      ``neighborhood_prompts``;
    - ZsRE: ``src``, ``subject``, ``answers``, ``alt``, ``rephrase``, ``loc``, ``loc_ans``;
    - KnowEdit: ``prompt``, ``subject``, ``target_new``, ``locality`` by group (WikiData_counterfact, WikiData_recent,
      ZsRE) or ``text``, ``concept``, ``labels`` (WikiBio); Sanitation;
    - WikiBigEdit: ``update``, ``subject``, ``ans``;
    - MQuAKE: ``requested_rewrite`` as a list; RippleEdits: ``edit``, ``example_type``;
    - UnKEBench: ``question``, ``answer``, ``sub_question``; AKEW: ``fact_new_uns`` in ``requested_rewrite``;
    - HalluEditBench: ``question``, ``subject``, ``object``; UltraEditBench: ``prompt``, ``ans``, ``loc``; CKnowEdit:
      ``prompt``, ``target_old``, ``target_new``.

    A record that can't be used is skipped and listed with the reason. Where most records have a true answer (or a
    subject), so must all; where most have none, records without are used: the protocol is then "token_accuracy", which
    compares with no true answer, and only methods that do not use the subject can edit.

    Args:
        source: the file, or the name of bundled data.
        protocol: how the records are read and judged, one of `PROTOCOLS`; by default the layout's own. ZsRE can be
            "zsre" (its own) or "zsre-alternative"; where the own is "counterfact", "token_accuracy" is possible.

    Warns (`EditingWarning`) of columns that are not used.

    Raises:
        DataError: missing file, in another encoding or format, an unknown layout, a protocol that the layout does not
            have, or not one usable record.
    """
    content, where = _content(source)
    found = _parse(content, where, protocol)
    _warn_unknown(found, where)
    return _record_set(found, where)


def load_facts(source: str | Path, strict: bool = False, protocol: str | None = None) -> FactSet:
    """Read the facts of a file to edit them; files and layouts are those of `load_records`.

    A fact needs a prompt and a new target. One bad line does not stop the others: it is listed, as are facts that
    repeat or contradict an earlier one, which could not be edited in one batch with it.

    Args:
        source: the file, or the name of bundled data.
        strict: refuse the file if anything in it can't be used.
        protocol: as in `load_records`; of ZsRE it says which answer is written.

    Warns (`EditingWarning`) of columns that are not used.

    Raises:
        DataError: what `load_records` raises; with ``strict`` also a line, a fact or a prompt that can't be used.
    """
    content, where = _content(source)
    found = _parse(content, where, protocol)
    _warn_unknown(found, where)
    facts, refused = _without_conflicts(found.records, found.unit)
    skipped = tuple(sorted([*found.skipped, *refused]))
    if strict and (skipped or found.dropped):
        raise DataError(_problems(sorted([*skipped, *found.dropped]), found.unit, where))
    if not facts:
        raise DataError(_none_usable(found, skipped, where))
    judged = found.protocol if all(record.request.ground_truth for _, record in facts) else _without_truth(found)
    return FactSet(
        tuple(record for _, record in facts),
        tuple(number for number, _ in facts),
        judged,
        skipped,
        found.dropped,
        found.unknown,
        found.unit,
    )


def parse_records(
    items: Sequence[Mapping[str, Any]] | Mapping[str, Any], where: str = "the data", protocol: str | None = None
) -> RecordSet:
    """Records of one layout, recognised by the first item that has one; see `load_records`."""
    numbers = tuple(range(len(items))) if isinstance(items, Sequence) else ()
    return _record_set(_parse(Content(items, numbers), where, protocol), where)


def _content(source: str | Path) -> tuple[Content, str]:
    bundled = {
        factworld.MODEL_NAME: factworld.data_path("counterfact.json"),
        f"{factworld.MODEL_NAME}-easyedit": factworld.data_path("easyedit.json"),
        NEUTRAL: Path(__file__).with_name("neutral.json"),
    }
    path = bundled.get(str(source)) or path_of(source, "facts", DataError)
    if not is_file(path):
        raise DataError(f"The data file {path} does not exist. Bundled data: {', '.join(bundled)}.")
    return read_file(path), str(path)


@dataclass(frozen=True)
class _Found:
    """All entries of a file, read by its layout."""

    layout: Layout
    records: tuple[tuple[int, EvaluationRecord], ...]
    items: Mapping[int, Mapping[str, Any]]
    skipped: Reasons
    dropped: Reasons
    unknown: tuple[str, ...]
    unit: str
    count: int

    @property
    def protocol(self) -> str:
        return self.layout.protocol


def _parse(content: Content, where: str, protocol: str | None) -> _Found:
    items, numbers = content.items, content.numbers
    if is_sanitation(items):
        items = sanitation_items(items, where)
        numbers, layout = tuple(range(len(items))), SANITATION
    else:
        layout = _layout([dict.fromkeys(content.header)] if content.header else items, where)
    if layout is MQUAKE:
        several, places = mquake_items(items, numbers)
        items, numbers = several, tuple(places)
    layout = _as_asked(layout, protocol, where)
    records, skipped, dropped = [], list(content.unreadable), []
    for number, item in zip(numbers, items, strict=True):
        try:
            if not isinstance(item, Mapping):
                raise RequestError(f"A record must be a dict; found {type(item).__name__}.")
            record, reasons = layout.parse(item)
        except (RequestError, KeyError) as error:
            skipped.append((number, f"missing {error}" if isinstance(error, KeyError) else str(error)))
            continue
        records.append((number, record))
        dropped += [(number, reason) for reason in reasons]
    unknown = unknown_columns([dict.fromkeys(content.header), *items]) if layout.parse is parse_columns else ()
    by_number = {number: item for number, item in zip(numbers, items, strict=True) if isinstance(item, Mapping)}
    count = len(items) + len(content.unreadable)
    return _Found(
        layout, tuple(records), by_number, tuple(sorted(skipped)), tuple(dropped), unknown, content.unit, count
    )


def _as_asked(layout: Layout, protocol: str | None, where: str) -> Layout:
    """The layout as a protocol reads it.

    Raises:
        DataError: a protocol that it does not have.
    """
    choices = {one.protocol: one for one in (layout, *_other_protocols(layout))}
    if protocol is None or protocol in choices:
        return choices[protocol or layout.protocol]
    raise DataError(
        f"{where} can be read by the protocol {' or '.join(choices)}; {protocol!r} was asked for."
        + did_you_mean(protocol, choices)
    )


def _layout(items: Any, where: str) -> Layout:
    listed = items if isinstance(items, Sequence) and not isinstance(items, str) else ()
    dicts = [item for item in listed if isinstance(item, Mapping)]
    if not dicts:
        raise DataError(f"{where} must hold a non-empty list of records; found {type(items).__name__}.")
    layout = next((found for item in dicts if (found := _layout_of(item))), None)
    if layout is None:
        raise DataError(_unknown_layout(dicts[0], where))
    return layout


def _layout_of(item: Mapping[str, Any]) -> Layout | None:
    if "requested_rewrite" in item:
        rewrite = item["requested_rewrite"]
        several = isinstance(rewrite, Sequence) and not isinstance(rewrite, str)
        return AKEW if is_akew(item) else MQUAKE if several else ROME
    if "src" in item and ("alt" in item or "answers" in item):
        return ZSRE if "answers" in item else ZSRE_ALTERNATIVE
    if "update" in item and "ans" in item:
        return WIKIBIGEDIT
    if _is_grouped(item.get("locality")) or {"text", "concept", "labels"} <= item.keys():
        return KNOWEDIT
    for layout, keys in _KEYS.items():
        if keys <= item.keys():
            return layout
    return COLUMNS if is_columns(item) else None


_KEYS = {
    RIPPLEEDITS: {"edit", "example_type"},
    UNKEBENCH: {"question", "answer", "sub_question"},
    HALLUEDITBENCH: {"question", "object", "subject"},
    ULTRAEDITBENCH: {"prompt", "ans", "loc"},
    CKNOWEDIT: {"prompt", "target_old", "target_new"},
}
"""Keys by which further layouts are known."""


def _is_grouped(locality: Any) -> bool:
    """Whether these are KnowEdit's groups; EasyEdit's own requests have groups of any name."""
    return isinstance(locality, Mapping) and (not locality or any(name in locality for name in LOCALITY))


def _unknown_layout(item: Mapping[str, Any], where: str) -> str:
    if {"ent", "pos", "neg"} <= item.keys():
        return (
            f"{where} is a ConvSent file: topics with positive and negative opinions. It has neither prompts nor "
            "targets and is judged by a sentiment classifier, so it can't be read as edits of facts."
        )
    keys = ", ".join(sorted(str(key) for key in item))
    return (
        f"{where}: unknown layout with the keys {keys}. Expected columns (prompt, subject, target_new, as EasyEdit's "
        "CounterFact), CounterFact (requested_rewrite), ZsRE (src, subject, answers, alt), KnowEdit (prompt, subject, "
        "target_new, locality; or text, concept, labels), WikiBigEdit (update, subject, ans), MQuAKE "
        "(requested_rewrite as a list), RippleEdits (edit, example_type), UnKEBench (question, answer, sub_question), "
        "AKEW (fact_new_uns in requested_rewrite), HalluEditBench (question, subject, object), UltraEditBench (prompt, "
        "ans, loc) or CKnowEdit (prompt, target_old, target_new)."
    )


def _warn_unknown(found: _Found, where: str) -> None:
    if found.unknown:
        warnings.warn(unknown_message(found.unknown, where), EditingWarning, stacklevel=3)


def _record_set(found: _Found, where: str) -> RecordSet:
    """The records that can be judged as the file asks; see `load_records`."""
    requests = [record.request for _, record in found.records]
    needs_truth = found.protocol == "counterfact" and _most(requests, "ground_truth")
    needs_subject = _most(requests, "subject")
    records, skipped = [], list(found.skipped)
    for number, record in found.records:
        reason = _not_judged(found.layout, found.items[number], record, needs_truth, needs_subject)
        if reason:
            skipped.append((number, reason))
        else:
            records.append((number, record))
    if not records:
        raise DataError(_none_usable(found, tuple(skipped), where))
    protocol = found.protocol if needs_truth else _without_truth(found)
    kept = {number for number, _ in records}
    dropped = tuple((number, reason) for number, reason in found.dropped if number in kept)
    return RecordSet(tuple(r for _, r in records), protocol, tuple(sorted(skipped)), dropped, found.unit)


def _most(requests: Sequence[Any], name: str) -> bool:
    """Whether at least half of the requests have a field."""
    return 2 * sum(bool(getattr(request, name)) for request in requests) >= len(requests)


def _not_judged(
    layout: Layout, item: Mapping[str, Any], record: EvaluationRecord, needs_truth: bool, needs_subject: bool
) -> str:
    """Why a record that can be edited can't be judged; empty where it can."""
    missing = [repr(key) for key in layout.judged_by if absent(item.get(key))]
    if needs_truth and not (record.request.ground_truth or "").strip():
        missing.append(
            "'target_true'" if layout.parse is parse_rome_counterfact else "the true answer ('ground_truth')"
        )
    if needs_subject and record.request.subject is None:
        missing.append("'subject'")
    return f"missing {', '.join(missing)}, which other records of this file have" if missing else ""


def _without_truth(found: _Found) -> str:
    """The protocol for records without a true answer."""
    return "token_accuracy" if found.protocol == "counterfact" else found.protocol


def _without_conflicts(
    records: Sequence[tuple[int, EvaluationRecord]], unit: str
) -> tuple[list[tuple[int, EvaluationRecord]], list[tuple[int, str]]]:
    """Records whose prompts differ, and why each other one is refused: the first with a prompt counts."""
    kept, refused = [], []
    seen: dict[str, tuple[int, str]] = {}
    for number, record in records:
        prompt, target = same_text(record.request.prompt), same_text(record.request.target_new)
        if prompt not in seen:
            seen[prompt] = (number, target)
            kept.append((number, record))
            continue
        other, earlier = seen[prompt]
        if earlier == target:
            refused.append((number, f"the same fact as {unit} {other}."))
        else:
            refused.append(
                (number, f"conflicts with {unit} {other}: {prompt!r} -> {target!r} here, {earlier!r} there. Keep one.")
            )
    return kept, refused


def _none_usable(found: _Found, skipped: Reasons, where: str) -> str:
    first = f"; the first, {found.unit} {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
    return f"{where}: none of {found.count} records can be used{first}"


def _problems(reasons: Sequence[tuple[int, str]], unit: str, where: str) -> str:
    shown = "; ".join(f"{unit} {number}: {reason}" for number, reason in reasons[:SHOWN])
    more = f"; and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
    return f"{where} can't be used as a whole, which strict asks for: {shown}{more}"
