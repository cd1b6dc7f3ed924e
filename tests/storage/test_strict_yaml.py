from __future__ import annotations

import time

import pytest
import yaml

from easyedit_moe.storage.strict_yaml import MOST_VALUES, parse_yaml


def bomb(entry: str) -> str:
    """Ten levels of anchors, each of which names the one before ten times: 10 billion values in 500 letters."""
    lines = ["a: &a " + ("{x: 1}" if "<<" in entry else "[x]")]
    for before, name in zip("abcdefghi", "bcdefghij", strict=True):
        lines.append(f"{name}: &{name} " + entry.format(", ".join([f"*{before}"] * 10)))
    return "\n".join(lines)


REFUSED = {
    "a: 1\nb: 2\na: 3": "the key 'a' is given twice.*line 3, column 1",
    'a: 1\n"a": 1': "the key 'a' is given twice",
    "a: [{b: 1, b: 2}]": "the key 'b' is given twice",
    "a: {<<: {x: 1}, <<: {y: 2}}": "the key '<<' is given twice",
    "a: " + "1" * 5000: "can't be read as tag:yaml.org,2002:int",
    "a: 2024-13-45": "'2024-13-45' can't be read as tag:yaml.org,2002:timestamp.*line 1",
    "a: !!timestamp foo": "'foo' can't be read as tag:yaml.org,2002:timestamp",
    "a: !!int x": "can't be read as tag:yaml.org,2002:int",
    "a: !!bool maybe": "can't be read as tag:yaml.org,2002:bool",
    "a: !!python/object/apply:os.system [x]": "could not determine a constructor",
    "a: {b: !ours 3}": "could not determine a constructor for the tag '!ours'",
    "a: " + "[" * 5000: "nested too deeply",
    "a: &a [*a]": "a value contains itself",
    "&a {<<: *a}": "a value contains itself",
    "a: \0": "special characters are not allowed",
    "[1]: 2": "unhashable key",
    "a: 1\n---\nb: 2": "expected a single document",
    "a: [1": "expected ',' or ']'",
    bomb("[{}]"): f"more than {MOST_VALUES} values",
    bomb("{{<<: [{}]}}"): f"more than {MOST_VALUES} values",
}


@pytest.mark.parametrize(("text", "match"), REFUSED.items(), ids=lambda text: text[:20])
def test_what_is_refused_says_why_and_where(text: str, match: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match=match):
        parse_yaml(text)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: [x, 2.5, null, true]\nc: {d: 2024-01-31}",
        "base: &base {x: 1, y: 2}\none: {<<: *base, y: 3}\ntwo: {<<: [*base, {z: 4}]}\nlist: [*base, *base]",
        "a: !!float 1\nb: !!binary aGk=\nc: .inf",
        "'': 1\n? a\n: b",
        "",
    ],
)
def test_all_else_is_as_yaml_has_it(text: str) -> None:
    assert parse_yaml(text) == yaml.safe_load(text)


def test_many_values_are_fine() -> None:
    assert parse_yaml("a: [" + "1, " * (MOST_VALUES // 10) + "]")["a"] == [1] * (MOST_VALUES // 10)
