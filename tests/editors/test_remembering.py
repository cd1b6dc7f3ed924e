"""``remember_edits`` in loops over ``apply_to_model``, as EasyEdit's users write them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from solving_editors import hparams
from tiny import assert_same_state, requests, state_of, tiny_model, tiny_tokenizer
from torch import nn

from easyedit_moe.editor import MoEEditor
from easyedit_moe.editors import editor_class, remembering

TOK, FACTS = tiny_tokenizer(), requests(6)
Apply = Callable[..., Any]


pytestmark = pytest.mark.usefixtures("no_editing_warnings")


def settings(data: Path, method: str, **changes: Any) -> Any:
    own = {"Global": {"metric": "identity"}, "MoEEdit-BCD": {"metric": "identity"}, "MoE-AlphaEdit": {}}[method]
    few = {"lambda_reg": 1e-3, "v_num_grad_steps": 3, "v_lr": 0.5, "remember_edits": True}
    return hparams(data, method, **(few | own | changes))


def loop(model: nn.Module, hp: Any, batches: list[list[dict[str, str]]]) -> None:
    apply = editor_class(hp.alg_name).apply_to_model
    for batch in batches:
        apply(model, TOK, batch, hp, copy=False, return_orig_weights=True, keep_original_weight=False)


@pytest.mark.parametrize("method", ["Global", "MoE-AlphaEdit", "MoEEdit-BCD"])
def test_a_loop_remembers_as_sequential_editing_does(method: str, data: Path) -> None:
    hp, model, forgetful = settings(data, method), tiny_model(), tiny_model()
    batches = [FACTS[:2], FACTS[2:4], FACTS[4:]]
    loop(model, hp, batches)
    editor = MoEEditor(settings(data, method, batch_size=2), tiny_model(), TOK)
    editor.batch_edit([], [], requests=FACTS, sequential_edit=True, verbose=False)
    assert_same_state(state_of(editor.model), state_of(model))
    for batch in batches:
        loop(forgetful, hp, [batch])
        remembering._CALLS.pop(forgetful)
    assert any(not torch.equal(p, forgetful.get_parameter(name)) for name, p in model.named_parameters())


def test_without_the_setting_nothing_is_kept(data: Path) -> None:
    model = tiny_model()
    loop(model, settings(data, "Global", remember_edits=False), [FACTS[:1], FACTS[1:2]])
    assert model not in remembering._CALLS


def test_what_was_put_back_is_not_remembered(data: Path) -> None:
    """EasyEdit puts the weights back itself, from the dict that it was given."""
    hp, model, plain = settings(data, "Global"), tiny_model(), tiny_model()
    loop(model, hp, [FACTS[:1]])
    for trial in (FACTS[1:2], FACTS[2:3]):
        _, weights = editor_class("Global").apply_to_model(model, TOK, trial, hp, return_orig_weights=True)
        with torch.no_grad():
            for name, original in weights.items():
                model.get_parameter(name).copy_(original)
    loop(model, hp, [FACTS[3:4]])
    loop(plain, hp, [FACTS[:1], FACTS[3:4]])
    assert_same_state(state_of(plain), state_of(model))


def test_other_settings_begin_anew(data: Path) -> None:
    one, other = settings(data, "Global"), settings(data, "Global", layers=[1])
    model, plain = tiny_model(), tiny_model()
    loop(model, one, [FACTS[:1]])
    loop(model, other, [FACTS[1:2]])
    loop(plain, one, [FACTS[:1]])
    remembering._CALLS.pop(plain)
    loop(plain, other, [FACTS[1:2]])
    assert_same_state(state_of(plain), state_of(model))
    assert [k.num_tokens for k in remembering.remembered(model, one).keys[2]] == [1]
    assert remembering.remembered(model, settings(data, "Global", lambda_reg=0.5)) is None
    assert remembering.remembered(model, settings(data, "Global", batch_size=7)) is not None


def test_a_copy_remembers_what_its_original_did(data: Path) -> None:
    hp, model, plain = settings(data, "Global"), tiny_model(), tiny_model()
    loop(model, hp, [FACTS[:1]])
    before = state_of(model)
    copied, _ = editor_class("Global").apply_to_model(model, TOK, FACTS[1:2], hp, copy=True)
    assert_same_state(before, state_of(model))
    loop(plain, hp, [FACTS[:1], FACTS[1:2]])
    assert_same_state(state_of(plain), state_of(copied))
    assert len(remembering._CALLS[model]) == 1
    assert len(remembering._CALLS[copied]) == 2


def test_models_that_are_gone_leave_nothing(data: Path) -> None:
    gc.collect()
    known = len(remembering._CALLS)
    model = tiny_model()
    loop(model, settings(data, "Global"), [FACTS[:1]])
    assert len(remembering._CALLS) == known + 1
    del model
    gc.collect()
    assert len(remembering._CALLS) == known
