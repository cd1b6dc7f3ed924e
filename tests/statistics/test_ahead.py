"""Tokens that are made while the model is busy: the same, in order, a few ahead, in a thread that ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from tiny import TEXTS, tiny_model, tiny_tokenizer

from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.statistics import moments, token_cache
from easyedit_moe.statistics.ahead import DEPTH, made_ahead
from easyedit_moe.statistics.token_cache import TokenisedTexts, TokenKey

WAIT = 20


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")]


class Steps:
    """A function of numbers that notes who asked, and waits for a gate to open."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.gates = [threading.Event() for _ in range(20)]

    def __call__(self, number: int) -> int:
        assert threading.current_thread().name.startswith("ahead")
        self.made.append(number)
        self.gates[number].set()
        if number == 13:
            raise ValueError("thirteen")
        return number**2


def test_the_next_few_are_made_before_they_are_asked_for() -> None:
    steps = Steps()
    with made_ahead(steps, range(10)) as ahead:
        assert ahead.result(0) == 0
        assert steps.gates[DEPTH].wait(WAIT)
        assert not steps.gates[DEPTH + 1].wait(0.05), "no more than a few"
        assert [ahead.result(number) for number in range(1, 6)] == [1, 4, 9, 16, 25]
    assert steps.made == sorted(steps.made)
    assert len(steps.made) <= 6 + DEPTH
    assert not threads()


def test_out_of_turn_and_after_the_last() -> None:
    steps = Steps()
    with made_ahead(steps, [3, 5]) as ahead:
        assert [ahead.result(number) for number in (4, 3, 5, 6)] == [16, 9, 25, 36]
    assert sorted(steps.made) == [3, 4, 5, 6]


def test_an_error_comes_when_its_turn_does() -> None:
    with made_ahead(Steps(), [12, 13, 14]) as ahead:
        assert ahead.result(12) == 144
        with pytest.raises(ValueError, match="thirteen"):
            ahead.result(13)
        assert ahead.result(14) == 196
    assert not threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_thread_ends_whatever_is_raised(error: type[BaseException]) -> None:
    def fail() -> None:
        with made_ahead(Steps(), range(10)) as ahead:
            ahead.result(0)
            raise error

    with pytest.raises(error):
        fail()
    assert not threads()


@pytest.fixture
def corpus(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], TokenisedTexts]:
    monkeypatch.setattr(moments, "SHARD_CHARACTERS", 100)
    key = TokenKey("a", "b", 64)
    return lambda: TokenisedTexts(tiny_tokenizer(), TEXTS * 3, key, tmp_path / "tokens.safetensors")


def collect(texts: Any, **more: Any) -> Any:
    return moments.collect_moments(
        MoELayerView(tiny_model()), tiny_tokenizer(), texts, [1, 2], max_length=64, progress=False, **more
    )


def test_texts_are_tokenised_in_the_thread_and_statistics_are_the_same(
    corpus: Callable[[], TokenisedTexts], monkeypatch: pytest.MonkeyPatch
) -> None:
    names, encode = set[str](), token_cache.encode_cut

    def noted(*args: Any) -> Any:
        names.add(threading.current_thread().name.partition("_")[0])
        return encode(*args)

    plain = collect(TEXTS * 3)
    monkeypatch.setattr(token_cache, "encode_cut", noted)
    texts = corpus()
    assert len(texts) > 2 * DEPTH
    found = collect(texts)
    assert names == {"ahead"}
    assert not threads()
    for layer, one in plain.items():
        assert one.keys.equal(found[layer].keys)
        assert one.output.equal(found[layer].output)
    texts.keep()
    names.clear()
    again = corpus()
    assert collect(again)[1].keys.equal(plain[1].keys)
    assert not names, "what a file holds needs no thread"


def test_an_interrupted_forward_ends_the_thread(
    corpus: Callable[[], TokenisedTexts], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(moments, "_add_batch", interrupted)
    texts = corpus()
    with pytest.raises(KeyboardInterrupt):
        collect(texts)
    assert not threads()
    assert texts.part(len(texts) - 1), "parts can be had as before"


def test_a_text_that_cannot_be_tokenised(corpus: Callable[[], TokenisedTexts], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(tok: Any, text: str, cut: int) -> list[int]:
        raise RuntimeError("no tokens")

    monkeypatch.setattr(token_cache, "encode_cut", failing)
    with pytest.raises(RuntimeError, match="no tokens"):
        collect(corpus())
    assert not threads()
