"""How many sequences share a forward where nobody said so: what a GPU, here a pretended one, has free."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import requests, tiny_model, tiny_tokenizer

from easyedit_moe.facts.requests import parse_requests
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.shapes import Lengths, outline_of
from easyedit_moe.targets import memory
from easyedit_moe.targets.memory import SHARE, Room, enough, free_bytes, search_bytes
from easyedit_moe.targets.search import TargetSettings, TargetVectors, _Problem, compute_targets

SETTINGS = TargetSettings(1, 0.1, 0.0625, 0.1, 4.0, 0.0, None, "subject_last")
PREFIXES = ["A quiet harbour. ", "The fox: "]
TOK = tiny_tokenizer()


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences of each forward of the searches that follow, four for each request."""
    seen: list[int] = []
    start = _Problem.__init__

    def noted(self: Any, view: Any, pad: int, layer: int, groups: Any, *more: Any) -> None:
        seen.append(sum(map(len, groups)))
        start(self, view, pad, layer, groups, *more)

    monkeypatch.setattr(_Problem, "__init__", noted)
    return seen


def search(model: Any, count: int, batch_size: int | None = None) -> TargetVectors:
    settings, facts = replace(SETTINGS, batch_size=batch_size), parse_requests(requests(1)) * count
    return compute_targets(MoELayerView(model), TOK, facts, 1, PREFIXES, settings, progress=False, warn=False)


def pretend(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda devices: free)


def test_a_roomy_gpu_takes_all_at_once(monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    monkeypatch.setattr(memory, "USUAL_SEQUENCES", 4)
    pretend(monkeypatch, 10**12)
    search(tiny_model(), 6)
    assert sizes == [6 * 4]


def test_a_full_gpu_takes_what_half_of_it_holds(monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    """By the arithmetic of plans, for the requests of each forward, and one at least."""
    model, asked = tiny_model(), []
    with monkeypatch.context() as patch:
        patch.setattr(Room, "holds", lambda *given: asked.append(given) or True)
        pretend(patch, 0)
        search(model, 6)
    _, count, contexts, lengths = asked[0]
    assert (count, contexts) == (6, 3)
    four = int(search_bytes(outline_of(model), 1, 4, contexts, lengths) / SHARE)
    for free, taken in ((four + 2, 16), (four - 2, 8), (1, 4)):
        sizes.clear()
        pretend(monkeypatch, free)
        search(model, 6)
        assert sizes[0] == taken
        assert sum(sizes) == 24


def test_what_is_said_and_a_cpu_count_as_before(monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    model = tiny_model()
    plain, said = search(model, 6), search(model, 6, 256)
    assert Room.of(MoELayerView(model), 1) is None
    torch.testing.assert_close(plain.delta, said.delta, rtol=0, atol=0)
    assert plain.batches == said.batches
    pretend(monkeypatch, 10**12)
    search(model, 6, 9)
    assert sizes == [24, 24, 8, 8, 8]


def test_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fullest GPU counts, with what torch holds of it without use."""
    found = {"mem_get_info": [(100, 200), (90, 200)], "memory_reserved": [50, 70], "memory_allocated": [45, 10]}
    for name, values in found.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, values=values: values[device.index])
    assert free_bytes([torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cpu")]) == 105
    assert free_bytes([torch.device("cpu"), torch.device("meta")]) is None
    assert [enough(size) for size in (1, 256, 257, 1000)] == [256, 256, 512, 1024]


def test_a_config_that_does_not_tell_sizes_has_the_usual_number(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    pretend(monkeypatch, 10**12)
    room = Room.of(MoELayerView(model), 1)
    assert room is not None
    assert room.bytes == SHARE * 10**12
    assert room.holds(1, 1, Lengths())
    monkeypatch.setattr("easyedit_moe.moe.shapes._EXPERTS_PER_TOKEN", ())
    assert Room.of(MoELayerView(model), 1) is None
