"""Where a text names a subject."""

from __future__ import annotations

import unicodedata

import pytest

from easyedit_moe.errors import RequestError
from easyedit_moe.facts.requests import EditRequest, parse_request
from easyedit_moe.facts.subjects import Folded, find_all, find_subject, mentions, nearest_span
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


NAMED = [
    ("Ana's town", "Ana", "Ana"),
    ("The ﬁnal act", "final", "ﬁnal"),
    ("the oﬃce is", "office", "oﬃce"),
    ("ＡＮＡ speaks", "ANA", "ＡＮＡ"),
    ("H₂O boils", "H2O", "H₂O"),
    ("x² grows", "x2", "x²"),
    ("An\u200ba sings", "Ana", "An\u200ba"),
    ("Gra\xadu\xadteksen sings", "Grauteksen", "Gra\xadu\xadteksen"),
    ("\ufeffAna sings", "Ana", "Ana"),
    ("東京Anaは", "Ana", "Ana"),
    ("在Ana家", "Ana", "Ana"),
    ("ASP.NET and .NET", "\u3000.NET", ".NET"),
    ("1,000 or 1", "1", "1"),
    ("5.3 and 5.", "5", "5"),
    ("-5 and 5", "5", "5"),
    ("at 5, then", "5", "5"),
    ("서울은 크다", "서울", "서울"),
    ("서울에서는 한다", "서울", "서울"),
    ("Ana는 산다", "Ana", "Ana"),
    ("C++는 빠르다", "C++", "C++"),
    ("학생들은 배운다", "학생", "학생"),
    ("東京은 크다", "東京", "東京"),
    ("وباريس مدينة", "باريس", "باريس"),
    ("בירושלים גר", "ירושלים", "ירושלים"),
    ("ובירושלים גר", "ירושלים", "ירושלים"),
    ("राम घर गया", "राम", "राम"),
    ("La capitale de l'Italie est", "Italie", "Italie"),
    ("dell’Italia", "Italia", "Italia"),
    ("İstanbul'da yaşar", "İstanbul", "İstanbul"),
    ("'Ana' is", "Ana", "Ana"),
    ("O'Neill", "O'Neill", "O'Neill"),
    ("a\u0307\u0323 x", "\u1ea1\u0307", "a\u0307\u0323"),
    ("Ana™ sells", "Ana", "Ana"),
    ("ｱﾅｳﾝｻｰは", "アナウンサー", "ｱﾅｳﾝｻｰ"),
    ("ﾊﾞﾅﾅが", "バナナ", "ﾊﾞﾅﾅ"),
    ("第10回", "10", "10"),
    (
        "\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e\u0e40\u0e1b\u0e47\u0e19",
        "\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e",
        "\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e",
    ),
    ("f(Ana)", "(Ana)", "(Ana)"),
    ("NASA'S plan", "NASA", "NASA"),
    ("C++ and C", "C", "C"),
    ("Ana-Maria", "Ana", "Ana"),
    ("①", "1", "①"),
    ("Jean‐Luc", "Jean-Luc", "Jean‐Luc"),
    ("Ana…", "Ana", "Ana"),
    (
        "\u1019\u103c\u1014\u103a\u1019\u102c\u1014\u102d\u102f\u1004\u103a\u1004\u1036",
        "\u1019\u103c\u1014\u103a\u1019\u102c",
        "\u1019\u103c\u1014\u103a\u1019\u102c",
    ),
    ("\u1015\u103c\u100a\u103a", "\u1015\u103c\u100a\u103a", "\u1015\u103c\u100a\u103a"),
    ("❤️ it", "❤", "❤"),
    ("U.S. law", "U.S.", "U.S."),
    ("u.s U.S. I", "I", "I"),
    ("5月5日", "5", "5"),
    ("Straße", "Straße", "Straße"),
    ("the ½ litre", "½", "½"),
    ("ﷺ Ana", "Ana", "Ana"),
    ("l'Ana", "Ana", "Ana"),
    ("d’Ana", "Ana", "Ana"),
    ("版本３です", "3", "３"),
    ("Ⅷ. Heinrich", "VIII", "Ⅷ"),
    ("ລາວ", "ລາວ", "ລາວ"),
    (
        "\u1797\u17d2\u1793\u17c6\u1796\u17c1\u1789\u1787\u17b6",
        "\u1797\u17d2\u1793\u17c6\u1796\u17c1\u1789",
        "\u1797\u17d2\u1793\u17c6\u1796\u17c1\u1789",
    ),
]
"""Compatibility forms, characters without width, scripts without spaces, and what languages write to a word."""
NOT_NAMED = [
    ("Ana's", "s"),
    ("Ana’s", "s"),
    ("5.3", "5"),
    ("5.3", "3"),
    ("1,000", "1"),
    ("1,000", "000"),
    ("12:30", "12"),
    ("1\u202f000", "1"),
    (".5", "5"),
    ("-5", "5"),
    ("\u0928\u092e\u0938\u094d\u0924\u0947", "म"),
    ("\u0928\u092e\u0938\u094d\u0924\u0947", "नम"),
    ("रामा", "राम"),
    ("राम", "म"),
    ("कि", "क"),
    ("서울역", "서울"),
    ("한국어를", "한국"),
    ("한국어를", "국"),
    ("대서울", "서울"),
    ("ASP.NET", "\u200c.NET"),
    ("C++ is", "C"),
    ("in C#", "C"),
    ("F# and", "F"),
    ("U.S.A", "U.S."),
    ("U.S.", "S"),
    ("U.S.", "U"),
    ("I.B.M.", "I"),
    ("O'Neill", "O"),
    ("O'Neill", "Neill"),
    ("Xi'an", "an"),
    ("Xi'an", "Xi"),
    ("o'clock", "o"),
    ("rock'n'roll", "n"),
    ("rock'n'roll", "rock"),
    ("they're", "re"),
    ("㍿", "株"),
    ("½", "1"),
    ("2½", "2"),
    ("ﬁ", "f"),
    ("An\xadabel", "An"),
    ("Ana\u200bbel", "Ana"),
    ("H₂O", "H"),
    ("\U0001f469\u200d\U0001f680", "👩"),
    ("👍🏽", "👍"),
    ("\u0e01\u0e32\u0e48", "กา"),
    ("アナー", "アナ"),
    ("C++11", "C++"),
    ("شباريس", "باريس"),
    ("١٫٥", "٥"),
    ("ａｂ", "a"),
    ("Zoe\u0308", "Zoe"),
    ("서울", "서우"),
    ("a_b", "a"),
    ("can't", "t"),
    ("Ana\u0301", "Ana"),
    ("شباب", "باب"),
    ("", "x"),
    ("x", "\u200b"),
    ("\u06a9\u062a\u0627\u0628\u200c\u0647\u0627", "کتاب"),
]
"""Inside words, numbers, names with a point or an apostrophe, characters and emoji."""


@pytest.mark.parametrize(("text", "subject", "found"), NAMED)
def test_named_in_every_form_and_script(text: str, subject: str, found: str) -> None:
    span = find_subject(text, subject)
    assert span is not None
    assert text[slice(*span)] == found
    assert found in [text[a:b] for a, b in find_all(Folded.of(text, True), Folded.of(subject.strip(), True).folded)]


@pytest.mark.parametrize(("text", "subject"), NOT_NAMED)
def test_not_named_by_a_part(text: str, subject: str) -> None:
    assert find_subject(text, subject) is None


@pytest.mark.parametrize(
    ("text", "subject", "near"),
    [
        ("我爱东京塔", "东京铁塔", "东京塔"),
        ("京都は日本", "東京", "京都"),
        ("大阪城公園へ行く", "大坂城", "大阪城"),
        ("กรุงเทพมหานครเป็น", "กรุงเทพมหานคน", "กรุงเทพมหานคร"),
        ("서울특별시는 크다", "서울시", "서울특별시는"),
        ("东京Annaは", "Ana", "Anna"),
        ("uses .NOT now", ".NET", ".NOT"),
        ("东京是首都", "大阪", ""),
        ("", "大阪", ""),
    ],
)
def test_nearest_words_of_every_script(text: str, subject: str, near: str) -> None:
    assert nearest_span(text, subject) == near


def test_a_long_text_is_searched_quickly() -> None:
    assert len(list(find_all(Folded.of("Ana sings. " * 20_000), "Ana"))) == 20_000


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
