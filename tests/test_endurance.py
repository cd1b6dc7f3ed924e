"""Fifty edits that follow each other: each names the one before, and all are undone to the first bit."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from solving_editors import TOK, plain_ridge
from tiny import assert_same_state, requests, state_of, tiny_model

from easyedit_moe.editor import MoEEditor

EDITS = 50


@pytest.mark.usefixtures("no_editing_warnings")
@pytest.mark.parametrize("remember", [False, True])
def test_fifty_edits_are_undone_to_the_first_bit(remember: bool, data: Path) -> None:
    hp = plain_ridge(data, v_num_grad_steps=1, layers=[1], remember_edits=remember)
    editor = MoEEditor(hp, tiny_model(), TOK)
    states = [state_of(editor.model)]
    targets = ("Rome", "Paris", "Polish", "Russia")
    made = itertools.islice(itertools.cycle(itertools.product(requests(6), targets)), EDITS)
    for number, (request, target) in enumerate(made):
        editor.normal_edit(request["prompt"], target, sequential_edit=True, subject=request["subject"])
        assert len(editor.patches) == number + 1
        if number in (9, 29):
            states.append(state_of(editor.model))
    ids = [patch.id for patch in editor.patches]
    assert len(set(ids)) == EDITS
    assert [patch.parent for patch in editor.patches] == [None, *ids[:-1]]
    if remember:
        assert sum(keys.num_tokens for keys in editor.memory.keys[1]) == 6, "an edit supersedes that of its prompt"
    for left, state in ((30, states[2]), (10, states[1]), (0, states[0])):
        while len(editor.patches) > left:
            editor.undo()
        assert_same_state(state, state_of(editor.model))
    assert editor.memory is None
