"""Anchors of tokens: the one search of subjects, and special tokens between texts."""

from __future__ import annotations

import pytest
from tiny import tiny_tokenizer
from tokenizers import AddedToken

from easyedit_moe.facts.anchors import NO_ANCHOR, SubjectMatcher
from easyedit_moe.facts.subjects import find_subject

NAMES = ["Ana", "Rome", "東京", "Zoë", ".NET"]
TEXTS = [
    "Ana's town",
    "ANA",
    "Anabel",
    "Rome, Ana",
    "東京Anaは",
    "Zoe\u0308 sings",
    "ASP.NET",
    "on .NET",
    "An\u00ada",
    "Romeo",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_matcher_finds_what_the_search_finds(text: str) -> None:
    found = {NAMES[one.subject]: (one.start, one.end) for one in SubjectMatcher(tiny_tokenizer(), NAMES).find(text)}
    exact = {name: span for name in NAMES if (span := find_subject(text, name)) is not None}
    assert exact.items() <= found.items()
    assert all(text[slice(*span)].casefold() == name.casefold() for name, span in (found.items() - exact.items()))


def test_of_equal_spans_the_given_form_counts() -> None:
    for names in (["may", "May", "Zoe\u0308", "Zoë"], ["Zoë", "Zoe\u0308", "May", "may"]):
        matcher = SubjectMatcher(tiny_tokenizer(), names)
        for name in names:
            assert [names[one.subject] for one in matcher.find(f"In {name} x")] == [name]


def chat_tokenizer():
    tok = tiny_tokenizer("bos")
    tok.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tok.add_tokens([AddedToken("<|turn|>", special=True)])
    return tok


@pytest.mark.parametrize("special", ["<|end|>", "<|turn|>", "<bos>"])
def test_special_tokens_part_texts(special: str) -> None:
    tok = chat_tokenizer()
    matcher = SubjectMatcher(tok, NAMES)
    encoded = [tok(part, add_special_tokens=False)["input_ids"] for part in ("I met Ana", "bel and Rome", "o is here")]
    between = [tok.convert_tokens_to_ids(special)]
    ids = [*between, *encoded[0], *between, *between, *encoded[1], *between, *encoded[2], *between]
    found = matcher.anchors(ids)
    first = len(between) + len(encoded[0]) - 1
    assert found[first] == found[first + 2] == 0
    second = first + 2 + len(encoded[1])
    assert found[second] == found[-1] == 1
    assert found[second - 1] == 0 or "Rome" in tok.decode(ids[first + 3 : second])
    assert found[0] == NO_ANCHOR
    # No subject is made of two texts.
    split = [tok(part, add_special_tokens=False)["input_ids"] for part in ("I met An", "a here")]
    assert set(matcher.anchors([*split[0], *between, *split[1]])) == {NO_ANCHOR}


def test_nothing_and_special_tokens_alone() -> None:
    tok = chat_tokenizer()
    matcher = SubjectMatcher(tok, NAMES)
    assert matcher.anchors([]) == []
    assert matcher.anchors([tok.bos_token_id] * 3) == [NO_ANCHOR] * 3
    assert SubjectMatcher(tok, ()).anchors(tok("Ana")["input_ids"]).count(NO_ANCHOR) == len(tok("Ana")["input_ids"])
