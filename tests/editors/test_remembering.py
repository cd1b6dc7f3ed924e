"""``remember_edits`` in loops over ``apply_to_model``, as EasyEdit's users write them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from solving_editors import hparams
from tiny import assert_same_state, requests, state_of, tiny_model, tiny_tokenizer
from torch import nn

from easyedit_moe.algebra.routed_keys import RoutedKeys
from easyedit_moe.editor import MoEEditor
from easyedit_moe.editors import SolvingEditor, editor_class, make_editor, remembering
from easyedit_moe.editors.memory import EditMemory, Remembered
from easyedit_moe.facts.requests import parse_requests

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


@pytest.mark.parametrize(
    "option",
    [
        {"replay_facts": 2}, {"join_facts": True}, {"anchor_targets": True},
        {"norm_anchor": 1.0001}, {"sequence_rate": 1.0}, {"refresh_every": 2}, {"preservation_bound": 1e-9},
    ],
    ids=str,
)  # fmt: skip
def test_a_loop_carries_on_what_options_for_long_runs_do(option: dict[str, Any], data: Path) -> None:
    needs = {"metric": "covariance"} if option.keys() & {"refresh_every", "preservation_bound"} else {}
    hp, model = settings(data, "Global", remember_edits=False, **needs, **option), tiny_model()
    assert hp.carries
    loop(model, hp, [FACTS[:2], FACTS[2:4], FACTS[4:]])
    editor = MoEEditor(replace(hp, batch_size=2), tiny_model(), TOK)
    editor.batch_edit([], [], requests=FACTS, sequential_edit=True, verbose=False)
    assert_same_state(state_of(editor.model), state_of(model))


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


# ---------------------------------------------------------------- what is remembered, and for how long


LIFELONG = {"layers": [2], "lambda_reg": 1e-3, "remember_edits": True}


@pytest.mark.parametrize("method", ["Global", "MoTE", "MoEEdit-BCD", "BCD+speedup", "MoE-MEMIT", "MoE-ROME"])
def test_a_fact_edited_again_reaches_every_new_target(method: str, data: Path) -> None:
    """Its old key would hold it back: with it in place less than half of the way is made."""
    fact, other = FACTS[0], FACTS[1]
    model, editor = tiny_model(), make_editor(hparams(data, method, **LIFELONG | {"lambda_reg": 1e-6}), progress=False)
    memory = editor.edit(model, TOK, parse_requests([fact, other])).memory
    for target in ("Paris", "Rome", "Leiden", "Oslo", "Paris"):
        result = editor.edit(model, TOK, parse_requests([{**fact, "target_new": target}]), memory)
        memory = result.memory
        assert sum(keys.num_tokens for keys in memory.keys[2]) == 2
        assert result.diagnosis.facts[0].residual_share > 0.9


@pytest.mark.parametrize("method", ["Global", "MoTE", "MoEEdit-BCD"])
def test_edits_are_the_same_as_with_every_key_as_a_row(
    method: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single edits, five contexts each, one fact edited again, and one batch undone in between."""
    facts = [*FACTS[:5], FACTS[4], FACTS[5], {**FACTS[2], "target_new": "Paris"}]
    growing, bounded = (MoEEditor(few_unknowns(data, method), tiny_model(), TOK) for _ in range(2))
    for editor in (growing, bounded):
        with monkeypatch.context() as patched:
            if editor is growing:
                patched.setattr(type(editor.editor), "solve_beside", SolvingEditor.solve_beside)
            for number, fact in enumerate(facts):
                editor.edit_requests([fact], sequential_edit=True, verbose=False)
                if number == 4:
                    editor.undo()
    for name, weight in growing.model.named_parameters():
        other = bounded.model.get_parameter(name)
        torch.testing.assert_close(other, weight, rtol=1e-5, atol=1e-6 * float(weight.detach().abs().max()))
    ((_, held),) = bounded.editor.holding._held.values()
    assert held.num_rows == 25 > held.coordinates.size
    ranks = {len(c) for _, update in bounded.patches[-1].steps for c in update.columns}
    assert max(ranks) <= 5
    for before, after in zip(growing.patches, bounded.patches, strict=True):
        found, wanted = (patch.steps[0][1].dense(8) for patch in (after, before))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
        assert wanted.norm() > 0


def few_unknowns(data: Path, method: str) -> Any:
    """A null space so small that the rows of five facts are more than there are unknowns."""
    core = {"rank_in": 1, "rank_expert": 4, "whitening": "none"} if method == "MoTE" else {}
    contexts = ["It is said that ", "In Paris, ", "Well, ", "So "]
    return hparams(data, method, **LIFELONG, **core, context_prefixes=contexts, nullspace_threshold=0.005)


def test_the_memory_of_every_batch_takes_no_more_than_that_of_the_last() -> None:
    def solve(*prompts: str) -> Remembered:
        count = len(prompts)
        keys = RoutedKeys(torch.zeros(count, 1).long(), torch.ones(count, 1), torch.rand(count, 1, 3))
        return Remembered(prompts, {0: keys})

    steps = [solve("a", "b"), solve("c"), solve("a"), solve("d")]
    values = [EditMemory()]
    for step in steps:
        values.append(values[-1].extended([step], len(step.prompts)))
    assert [value.edits for value in values] == [0, 2, 3, 4, 5]
    assert len({id(value._log) for value in values[1:]}) == 1
    held = [[(steps.index(s), i) for s, i in value.rows(0)] for value in values]
    assert held == [[], [(0, 0), (0, 1)], [(0, 0), (0, 1), (1, 0)], [(0, 1), (1, 0), (2, 0)], [*held[3], (3, 0)]]
    assert [keys.num_tokens for keys in values[-1].keys[0]] == [1, 1, 1, 1]
    assert [(steps.index(s), i) for s, i in values[-1].rows(0, ["b", "d"])] == [(1, 0), (2, 0)]
    other = values[2].extended([solve("e")], 1)
    assert len(other.rows(0)) == 4
    assert len(values[-1].rows(0)) == 4
    assert other._log is not values[-1]._log
