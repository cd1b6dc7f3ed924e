"""Several threads on one model: each edit is whole, none meets another's hooks, and all can be undone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from baselines import settings
from solving_editors import TOK, plain_ridge
from tiny import assert_same_state, facts, requests, state_of, tiny_model

from easyedit_moe.editor import MoEEditor
from easyedit_moe.editors import make_editor
from easyedit_moe.evaluation.generation import generate_answers
from easyedit_moe.evaluation.scoring import score_targets
from easyedit_moe.moe.capture import capture_facts
from easyedit_moe.moe.layers import MoELayerView

pytestmark = pytest.mark.usefixtures("no_editing_warnings")


def at_once(works: list[Callable[[], Any]]) -> list[Any]:
    """What each gives, run in a thread of its own; its error where it fails."""
    found: list[Any] = [None] * len(works)
    start = threading.Barrier(len(works))

    def run(number: int) -> None:
        start.wait()
        try:
            found[number] = works[number]()
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    return found


def test_editors_of_their_own(data: Path) -> None:
    """Sixteen edits of one model by four threads; each wraps its own weights, and all are taken back in the end."""
    model, patches = tiny_model(), []
    before = state_of(model)

    def work(number: int) -> None:
        method = ("Global", "MoE-FT", "MoE-LoRA", "Global")[number]
        hp = plain_ridge(data) if method == "Global" else settings(method, num_steps=1)
        editor = make_editor(hp, progress=False)
        for fact in facts(4):
            patches.append(editor.edit(model, TOK, [fact]).patch)

    errors = [error for error in at_once([lambda n=n: work(n) for n in range(4)]) if error is not None]
    assert errors == []
    assert len(patches) == 16
    left = list(patches)
    while left:  # the newest is the one whose weights lie on the model
        for patch in reversed(left):
            try:
                patch.revert(model)
            except ValueError:
                continue
            left.remove(patch)
            break
        else:
            raise AssertionError("none of the patches is the newest")
    assert_same_state(before, state_of(model))


def test_one_editor_for_all(data: Path) -> None:
    editor = MoEEditor(plain_ridge(data), tiny_model(), TOK)
    before = state_of(editor.model)
    works = [
        lambda one=one: editor.edit_requests([one], sequential_edit=True, verbose=False) for one in (*requests(4),) * 2
    ]
    assert [type(result) for result in at_once(works)] == [tuple] * 8
    assert len(editor.patches) == 8
    ids = [patch.id for patch in editor.patches]
    assert [patch.parent for patch in editor.patches] == [None, *ids[:-1]]
    for _ in range(8):
        editor.undo()
    assert_same_state(before, state_of(editor.model))


def test_scores_answers_and_captures_see_no_half_edited_model(data: Path) -> None:
    """While edits come and go, everybody else sees the model as it is between two of them."""
    model = tiny_model()
    view = MoELayerView(model)
    editor = MoEEditor(plain_ridge(data), model, TOK)
    before, pairs = state_of(model), [(one["prompt"], one["target_new"]) for one in requests(3)]
    looks: dict[str, Callable[[], Any]] = {
        "scores": lambda: score_targets(model, TOK, pairs),
        "answers": lambda: generate_answers(model, TOK, [pairs[0][0]], 2),
        "capture": lambda: capture_facts(view, [[5, 6, 7]], [1], [1, 2], [2], 0).outputs[2].tolist(),
    }
    plain = {name: look() for name, look in looks.items()}
    works: list[Callable[[], Any]] = [lambda: [editor.edit_requests(requests(2), verbose=False) for _ in range(2)]]
    works += [lambda look=look: [look() for _ in range(4)] for look in looks.values()]
    _, *seen = at_once(works)
    for name, found in zip(plain, seen, strict=True):
        assert found == [plain[name]] * 4, name
    assert_same_state(before, state_of(model))


def test_an_error_in_one_thread_lets_the_others_go_on(data: Path) -> None:
    model = tiny_model()
    editor = make_editor(plain_ridge(data), progress=False)
    before = state_of(model)
    bad, good = facts(2)
    bad = replace(bad, subject=None)
    found = at_once(
        [
            lambda: editor.edit(model, TOK, [bad]),
            lambda: make_editor(plain_ridge(data), progress=False).edit(model, TOK, [good]),
        ]
    )
    assert isinstance(found[0], ValueError)
    found[1].patch.revert(model)
    assert_same_state(before, state_of(model))
