"""Hypothesis strategies for values that users should not give, and for what they should, changed a little."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from easyedit_moe.facts.requests import EditRequest

LONE = st.characters(categories=["Cs"])
TEXTS = st.one_of(
    st.text(max_size=20),
    st.text(alphabet=st.one_of(LONE, st.characters(codec="utf-8")), max_size=8),
    st.sampled_from(
        ["", " ", "\n", "\0", "Angola is in", "Angola is in ", "{}", "{} {}", "\u00e9", "e\u0301", "a\u200bb", "NaN",
         "1e400", "2024-13-45", "../../x", "/proc/nowhere", "~", "%s%n", "-1", "null", "x" * 300]
    ),
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**30, 10**400, -(10**30)]),
    st.floats(),
    st.booleans(),
    st.sampled_from([Decimal("NaN"), Decimal("1E+999"), np.float32(1), np.int64(3), np.float64("nan")]),
)
OTHERS = st.one_of(
    st.none(),
    st.binary(max_size=4),
    st.builds(lambda: torch.ones(2)),
    st.builds(lambda: torch.tensor(1.0)),
    st.builds(lambda: np.array(["Angola is in", "x"])),
    st.builds(lambda: np.array("Angola is in")),
    st.builds(lambda: np.str_("Angola is in")),
    st.builds(lambda: iter(["Angola is in"])),
    st.builds(object),
    st.sampled_from([set(), {1}, range(3), Path("x"), int, EditRequest("a b", "a", "c")]),
)
LEAVES = st.one_of(TEXTS, NUMBERS, OTHERS)
KEYS = st.one_of(st.sampled_from(["prompt", "ground_truth", "str", "subject", "a"]), st.text(max_size=4))
JUNK = st.recursive(
    LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)), max_leaves=4
)
"""Anything that Python has."""
PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 10**18), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=5,
)
"""Anything that JSON has."""


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a structure has something: the keys and indices that lead there; () is the whole."""
    found = [path]
    if isinstance(value, Mapping):
        found += [place for key, item in value.items() for place in places(item, (*path, key))]
    elif isinstance(value, list):
        found += [place for number, item in enumerate(value) for place in places(item, (*path, number))]
    return found


def put(value: Any, place: Sequence[Any], new: Any, remove: bool) -> Any:
    """A copy of a structure with something else at one place, or nothing there."""
    if not place:
        return new
    whole = copy.deepcopy(value)
    inner = whole
    for step in place[:-1]:
        inner = inner[step]
    if remove:
        del inner[place[-1]]
    else:
        inner[place[-1]] = new
    return whole


@st.composite
def changed(draw: Any, good: Sequence[Any], junk: st.SearchStrategy[Any], most: int = 2) -> Any:
    """One of some good values, with up to ``most`` places removed or replaced."""
    value = draw(st.sampled_from(list(good)))
    for _ in range(draw(st.integers(0, most))):
        inside = places(value)[1:]
        place = draw(st.sampled_from(inside)) if inside and draw(st.integers(0, 9)) else ()
        value = put(value, place, draw(junk), remove=bool(place) and draw(st.booleans()))
    return value


@st.composite
def damaged(draw: Any, good: Sequence[bytes], most: int = 3) -> bytes:
    """One of some contents of files with bytes flipped, cut off, doubled or put in."""
    data = draw(st.sampled_from(list(good)))
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.sampled_from(["flip", "cut", "insert", "double", "drop"]))
        if how == "flip" and data:
            data = data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
        elif how == "cut":
            data = data[:at]
        elif how == "insert":
            data = data[:at] + draw(st.binary(min_size=1, max_size=4)) + data[at:]
        elif how == "double":
            data = data[:at] + data[max(0, at - 20) : at] + data[at:]
        else:
            data = data[:at] + data[at + draw(st.integers(1, 8)) :]
    return data


def as_json(value: Any) -> bytes:
    """JSON as Python writes it, NaN and lone surrogates included; other values as texts."""
    return json.dumps(value, default=str).encode("utf-8")
