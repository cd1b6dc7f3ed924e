"""Where a text names a subject."""

from __future__ import annotations

import unicodedata

import pytest

from easyedit_moe.errors import RequestError
from easyedit_moe.facts.requests import EditRequest, parse_request
from easyedit_moe.facts.subjects import find_subject, mentions, nearest_span
from easyedit_moe.facts.tokens import subject_span


@pytest.mark.parametrize(
    ("text", "subject", "found"),
    [
        ("the man he saw", "he", "he"),
        ("In Rome I sing", "I", "I"),
        ("Anabel met Ana", "Ana", "Ana"),
        ("Ana's town", "Ana", "Ana"),
        ("Zoë lives here", unicodedata.normalize("NFD", "Zoë"), "Zoë"),
        (unicodedata.normalize("NFD", "Zoë lives"), "Zoë", unicodedata.normalize("NFD", "Zoë")),
        ("Ana\u00a0 Lopes cooks", "Ana Lopes", "Ana\u00a0 Lopes"),
        ("O\u2019Neill plays", "O'Neill", "O\u2019Neill"),
        ("Jean\u2011Luc paints", "Jean-Luc", "Jean\u2011Luc"),
        ("我爱东京塔", "东京", "东京"),
        ("C++ is fast", "C++", "C++"),
        ("x=100% sure", "100%", "100%"),
        ("\\n{} is text", "{}", "{}"),
        (" Ana lives", "  Ana ", "Ana"),
    ],
)
def test_named(text: str, subject: str, found: str) -> None:
    span = find_subject(text, subject)
    assert span is not None
    assert text[slice(*span)] == found


@pytest.mark.parametrize(
    ("text", "subject"),
    [("the theme", "he"), ("This is it", "I"), ("Anabel", "Ana"), ("Zoë", "Zoe"), ("ana", "Ana"), ("x", " "),
     ("Zoe\u0308", "Zoe"), ("100", "10")],
)  # fmt: skip
def test_not_named(text: str, subject: str) -> None:
    assert not mentions(text, subject)


def test_the_nearest_words_are_named() -> None:
    assert nearest_span("The home of Olga Grautexen is", "Olga Grauteksen") == "Olga Grautexen"
    with pytest.raises(RequestError, match=r"The nearest words there are 'Olga Grautexen'\."):
        subject_span("The home of Olga Grautexen is", "Olga Grauteksen")
    with pytest.raises(RequestError, match=r"as whole words\.$"):
        EditRequest("The river flows", "Zed", "x")


def test_braces_are_a_slot_in_romes_layout_only() -> None:
    plain = {"prompt": "In {} and 100% of \\n, Ana is", "subject": "Ana", "target_new": "x"}
    assert parse_request(plain).prompt == plain["prompt"]
    rome = {"prompt": "{} lives in", "subject": "Ana", "target_new": {"str": "Rome"}}
    assert parse_request(rome).prompt == "Ana lives in"
    assert parse_request({"requested_rewrite": {**rome, "target_new": "Rome"}}).prompt == "Ana lives in"
