"""The neutral facts that ship: usable, free of contradictions, and with prompts that every measurement finds."""

from __future__ import annotations

from tiny import tiny_tokenizer

from easyedit_moe.facts.records import NEUTRAL, load_facts, load_records
from easyedit_moe.localisation.prompts import neighbours_alike, phrasings


def test_all_are_usable() -> None:
    found, tok = load_records(NEUTRAL), tiny_tokenizer()
    assert not found.skipped
    assert not found.dropped
    assert not load_facts(NEUTRAL, strict=True).skipped
    assert found.protocol == "counterfact"
    assert len(found.records) >= 20
    for record in found.records:
        assert len(phrasings(tok, record, "subject_last")) == 1 + len(record.paraphrases) == 3
        assert len(neighbours_alike(tok, record, "subject_last")) == len(record.neighbours) == 3


def test_none_contradicts_another() -> None:
    records = load_records(NEUTRAL).records
    edited = {record.request.prompt for record in records}
    assert len(edited) == len(records)
    for record in records:
        assert record.request.target_new != record.request.ground_truth
        for prompt, answer in record.neighbours:
            assert prompt not in edited
            assert answer != record.request.target_new
