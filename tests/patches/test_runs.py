"""Patches of one run share their originals, and each is still taken back bit for bit."""

from __future__ import annotations

import gc
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from planted_patches import write
from solving_editors import hparams, plain_ridge
from tiny import CONFIGS, assert_same_state, randomise, requests, state_of, tiny_model, tiny_tokenizer
from torch import nn

from easyedit_moe.editor import MoEEditor
from easyedit_moe.errors import EditingWarning, PatchError, RequestError
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches.files import load_patch
from easyedit_moe.patches.merging import folded, merge_weights, revert_run
from easyedit_moe.patches.runs import continues
from easyedit_moe.patches.weights import WeightPatch

TOK = tiny_tokenizer()
FAMILIES = ["qwen3_moe", "gpt_oss", "modulelist"]

pytestmark = pytest.mark.usefixtures("no_editing_warnings")


def run_of(model: nn.Module, count: int, **options: Any) -> list[WeightPatch]:
    patches: list[WeightPatch] = []
    for number in range(count):
        patch = write(model, seed=number, experts=[(0, 1, 2), (2, 3), (1, 4, 5, 6)][number % 3])
        continues(patch, patches[-1] if patches else None, **options)
        patches.append(patch)
    return patches


def held(patches: list[WeightPatch]) -> list[tuple[int, int]]:
    return [(n, e) for patch in patches for n, experts in patch.originals.items() for e in experts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_is_reverted_bit_for_bit_with_one_set_of_originals(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    states, patches = [state_of(model)], []
    for number in range(5):
        patches.append(write(model, seed=number, experts=[(0, 1, 2), (2, 3), (1, 2, 3)][number % 3]))
        continues(patches[-1], patches[-2] if number else None)
        states.append(state_of(model))
    assert sorted(held(patches)) == [(n, e) for n in (1, 2) for e in range(4)]
    for patch in reversed(patches):
        states.pop()
        patch.revert(model)
        assert_same_state(states[-1], state_of(model))
        assert not patch.applied
    assert len(states) == 1


def test_several_are_reverted_at_once_and_merged() -> None:
    model = tiny_model()
    first = run_of(model, 2)
    middle = state_of(model)
    rest = []
    for number in (2, 3, 4):
        rest.append(write(model, seed=number, experts=(1, 2, 6)))
        continues(rest[-1], (first + rest)[number - 1])
    after = state_of(model)
    merged = merge_weights(rest)
    revert_run(rest, model)
    assert_same_state(middle, state_of(model))
    assert not any(patch.applied for patch in rest)
    assert [patch.applied for patch in first] == [True, True]
    merged.forget()
    merged.apply(model)
    assert_same_state(after, state_of(model))


def test_what_was_reverted_or_changed_in_between_is_not_computed_again() -> None:
    model = tiny_model()
    first, second = run_of(model, 2)
    second.revert(model)
    third = write(model, seed=7, experts=(0, 2))
    continues(third, second)
    assert third.earlier is None
    assert len(held([third])) == 4
    third.revert(model)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "layers.1." in n and n.endswith("down_proj"))[0] += 1
    changed = state_of(model)
    fourth = write(model, seed=8, experts=(0, 2))
    continues(fourth, first)
    assert held([fourth]) == [(1, 0)]
    fourth.revert(model)
    assert_same_state(changed, state_of(model))


@pytest.mark.parametrize("as_model", [True, False])
def test_without_originals_the_base_is_what_leads_back(as_model: bool) -> None:
    model, base = tiny_model(), tiny_model()
    patches = run_of(model, 2, keep_originals=False)
    between, newest = state_of(model), write(model, seed=9, experts=(1, 2, 4))
    continues(newest, patches[-1], keep_originals=False)
    assert not held([*patches, newest])
    edited = state_of(model)
    with pytest.raises(PatchError, match="pass base="):
        newest.revert(model)
    assert_same_state(edited, state_of(model))
    newest.revert(model, base if as_model else base.state_dict())
    assert_same_state(between, state_of(model))
    revert_run(patches, model, base if as_model else base.state_dict())
    assert_same_state(state_of(base), state_of(model))


def test_a_run_may_be_longer_than_calls_can_be_nested() -> None:
    model, base, patches = tiny_model(), tiny_model(), list[WeightPatch]()
    for number in range(150):
        patches.append(write(model, seed=number, experts=(1,)))
        continues(patches[-1], patches[-2] if number else None, keep_originals=False)
    before, depth = sys.getrecursionlimit(), len(inspect.stack())
    sys.setrecursionlimit(depth + 130)
    try:
        assert not patches[-1].applied
        revert_run(patches, model, base)
    finally:
        sys.setrecursionlimit(before)
    assert_same_state(state_of(base), state_of(model))


def wide_model() -> nn.Module:
    """Experts large beside a factor of rank one, as in real models."""
    config = CONFIGS["qwen3_moe"]()
    config.hidden_size, config.moe_intermediate_size, config.head_dim, config.num_hidden_layers = 384, 64, 8, 3
    model = hf.AutoModelForCausalLM.from_config(config)
    randomise(model)
    model.set_experts_implementation("eager")
    return model.eval()


def bytes_held(editor: MoEEditor) -> int:
    """Tensors that the patches keep alive, each allocation once."""
    found: dict[int, int] = {}
    for patch in editor.patches:
        kept = [w for experts in patch.originals.values() for w in experts.values()]
        kept += [t for _, u in patch.steps for t in (u.left, *u.right, *u.columns)]
        for tensor in kept:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def test_sixty_edits_hold_little_more_than_ten(data: Path) -> None:
    """Facts are edited again and again, and remembered."""
    changes = {"v_num_grad_steps": 1, "remember_edits": True, "lambda_reg": 1e-2}
    editor = MoEEditor(hparams(data, "Global", layers=[2], **changes), wide_model(), TOK)
    before, facts, sizes = state_of(editor.model), requests(6), {}
    for number in range(60):
        fact = {**facts[number % 6], "target_new": ["Paris", "Rome", "Leiden"][number // 6 % 3]}
        editor.edit_requests([fact], sequential_edit=True, verbose=False)
        sizes[number + 1] = bytes_held(editor)
    gc.collect()
    assert sizes[60] < 1.3 * sizes[10]
    last = max(len(c) for _, update in editor.patches[-1].steps for c in update.columns)
    assert last == 1
    editor.undo(60)
    assert_same_state(before, state_of(editor.model))
    assert editor.patches == []
    assert editor.memory is None
    with pytest.raises(RequestError, match="no edit"):
        editor.undo()


def test_the_editor_undoes_some_and_goes_on(data: Path) -> None:
    editor = MoEEditor(plain_ridge(data, "Global", v_num_grad_steps=1), tiny_model(), TOK)
    states = [state_of(editor.model)]
    for fact in requests(5):
        editor.edit_requests([fact], sequential_edit=True, verbose=False)
        states.append(state_of(editor.model))
    editor.undo(2)
    assert_same_state(states[3], state_of(editor.model))
    with pytest.raises(RequestError, match="3 edits to undo; found count = 4"):
        editor.undo(4)
    assert editor.parent == editor.patches[-1].id
    editor.edit_requests([requests(4)[3]], sequential_edit=True, verbose=False)
    assert_same_state(states[4], state_of(editor.model))
    for number in (3, 2, 1, 0):
        editor.undo()
        assert_same_state(states[number], state_of(editor.model))


def test_keep_originals_false_is_undone_with_the_base(data: Path) -> None:
    hp = plain_ridge(data, "Global", v_num_grad_steps=1, keep_originals=False)
    editor = MoEEditor(hp, tiny_model(), TOK)
    for fact in requests(3):
        editor.edit_requests([fact], sequential_edit=True, verbose=False)
    assert not held(editor.patches)
    with pytest.raises(PatchError, match="base="):
        editor.undo()
    editor.undo(3, base=tiny_model())
    assert_same_state(state_of(tiny_model()), state_of(editor.model))


def test_a_run_folds_into_one_step_per_layer() -> None:
    """Exact to rounding: concatenated factors, of a rank that the matrices' sides bound."""
    model, base = tiny_model(), tiny_model()
    patches = run_of(model, 12)
    whole = merge_weights(patches)
    small = folded(whole)
    assert [layer for layer, _ in small.steps] == [1, 2]
    assert (small.before, small.after, small.id != whole.id) == (whole.before, whole.after, True)
    view = MoELayerView(model)
    for layer, update in small.steps:
        layout = view.layers[layer].experts.layout
        bound = min(layout.d_model, layout.d_hidden)
        assert max(len(columns) for columns in update.columns) <= bound
        wanted = sum(step.to(dtype=torch.float64).dense(8) for number, step in whole.steps if number == layer)
        torch.testing.assert_close(update.dense(8).double(), wanted, rtol=1e-5, atol=1e-6)
    assert (small.metadata["folded"], "folded" in whole.metadata) == (True, False)
    revert_run(patches, model)
    with pytest.warns(EditingWarning, match="The patch is folded"):
        small.apply(model)
    whole.forget()
    again = tiny_model()
    whole.apply(again)
    for name, weight in again.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=0, atol=1e-5)
    small.revert(model)
    assert_same_state(state_of(base), state_of(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folded_patch_is_taken_back_by_who_has_it_from_a_file_and_the_base(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model, base, path = tiny_model().to(dtype), tiny_model().to(dtype), tmp_path / "p.safetensors"
    patches = run_of(model, 12)
    folded(merge_weights(patches)).save(path)
    revert_run(patches, model)
    with pytest.warns(EditingWarning, match="The patch is folded"):
        load_patch(path).apply(model)
    edited = state_of(model)
    with pytest.raises(PatchError, match="later patch first"):
        load_patch(path).revert(model)
    later = write(model, seed=99, experts=(1, 2))
    with pytest.raises(PatchError, match="later patch first"):
        load_patch(path).revert(model, base)
    later.revert(model)
    assert_same_state(edited, state_of(model))
    load_patch(path).revert(model, base)
    assert_same_state(state_of(base), state_of(model))
