"""Ctrl-C wherever it falls: a model is edited and the edit recorded, or it is as it was."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny import assert_same_state, state_of, tiny_model
from torch import nn

from benchmarks.interrupting import Work, sweep
from benchmarks.robustness_interrupts import NAMES, run_all, works
from easyedit_moe.interrupts import do_all, uninterrupted
from easyedit_moe.moe.holding import held, intact


@pytest.fixture(autouse=True)
def sigint_interrupts() -> Iterator[None]:
    """Whoever starts the tests may have SIGINT ignored, as shells do for jobs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


SHORT = ("undo", "revert a patch", "attach an adapter", "detach an adapter", "apply a patch", "capture")


@pytest.mark.usefixtures("no_editing_warnings")
@pytest.mark.parametrize("name", NAMES)
def test_a_sample_of_all_lines(name: str) -> None:
    """benchmarks/robustness_interrupts.py tries every line."""
    stride = 250 if name == "caches" else 17 if name in SHORT else 83
    (found,) = run_all([name], stride, offset=NAMES.index(name))
    assert found.tried >= 5
    assert found.bad == []


def test_every_work_has_its_name(tmp_path: Path) -> None:
    assert tuple(works(tmp_path)) == NAMES


def careless(model: nn.Module) -> None:
    """What the sweep must object to: a loop that an interrupt ends half-way."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, training in flags:
        module.training = training


def test_the_sweep_sees_what_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.interrupting.SOURCE", str(Path(__file__).parent))
    model = tiny_model().train()
    found = sweep(Work("careless", model, lambda: careless(model), reset=model.train))
    assert found.bad


def section(done: list[int]) -> None:
    with uninterrupted():
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append(1)
        done.append(2)


def test_sigint_waits_and_then_comes() -> None:
    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        section(done)
    assert done == [1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_in_the_section_and_no_signal() -> None:
    with pytest.raises(ZeroDivisionError), uninterrupted():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_off_the_main_thread_nothing_changes() -> None:
    seen = []

    def look() -> None:
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with uninterrupted():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_all_steps_are_done_and_the_first_error_raised() -> None:
    done: list[int] = []

    def fail(number: int) -> None:
        done.append(number)
        raise ValueError(str(number))

    with pytest.raises(ValueError, match="2"):
        do_all([lambda: done.append(1), lambda: fail(2), lambda: done.append(3), lambda: fail(4)])
    assert done == [1, 2, 3, 4]


def break_everything(model: nn.Module) -> None:
    layer = model.model.layers[0]
    model.train()
    layer.register_forward_hook(lambda *_: None)
    layer.forward = lambda *_: None
    layer.add_module("more", nn.Linear(2, 2))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = torch.zeros_like(parameter)
    raise ZeroDivisionError


def test_whatever_is_broken_inside_is_put_back() -> None:
    model = tiny_model()
    before = state_of(model)
    with pytest.raises(ZeroDivisionError), intact(model):
        break_everything(model)
    assert_same_state(before, state_of(model))


def fail_after(model: nn.Module, undone: list[int], kept: Callable[[], bool] | None = None) -> None:
    with intact(model, kept) as hold:
        hold.undo += [lambda: undone.append(1), lambda: undone.append(2)]
        raise ZeroDivisionError


def fail_around(model: nn.Module, undone: list[int]) -> None:
    with intact(model):
        with intact(model, kept=lambda: True) as hold:
            hold.undo.append(lambda: undone.append(3))
        raise ZeroDivisionError


def test_what_is_kept_is_not_undone_but_by_the_scope_around_it() -> None:
    model, undone = tiny_model(), []
    with pytest.raises(ZeroDivisionError):
        fail_after(model, undone, lambda: True)
    assert not undone
    with pytest.raises(ZeroDivisionError):
        fail_around(model, undone)
    assert undone == [3]
    with intact(model) as hold:  # nothing is left of the scopes before
        assert hold.undo == []


def test_the_newest_is_undone_first_and_the_cause_is_raised() -> None:
    undone: list[int] = []
    with pytest.raises(ZeroDivisionError):
        fail_after(tiny_model(), undone)
    assert undone == [2, 1]


def test_another_thread_waits_until_the_model_is_free() -> None:
    model, order = tiny_model(), []
    taken, go_on = threading.Event(), threading.Event()

    def work() -> None:
        with held(model), held(model):
            taken.set()
            go_on.wait(10)
            order.append("first")

    thread = threading.Thread(target=work)
    thread.start()
    taken.wait(10)
    threading.Timer(0.05, go_on.set).start()
    with held(model):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
    with held(tiny_model(seed=1)):  # another model is another matter
        pass
