"""Patches of whole tensors that follow each other share one set of originals, and each is taken back bit for bit."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from baselines import TOK, settings
from planted_patches import new_values, some_names, write_tensors
from tiny import assert_same_state, facts, requests, state_of, tiny_model
from torch import Tensor, nn

from easyedit_moe.comparison.compare import compare
from easyedit_moe.comparison.task import Task
from easyedit_moe.editor import MoEEditor
from easyedit_moe.editors.training import TrainingEditor
from easyedit_moe.facts.records import EvaluationRecord
from easyedit_moe.moe.holding import intact
from easyedit_moe.patches.applied_run import AppliedRun
from easyedit_moe.patches.merging import merge_tensors
from easyedit_moe.patches.runs import continues_tensors
from easyedit_moe.patches.tensors import TensorPatch

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = ["qwen3_moe", "gpt_oss", "modulelist"]


class Stopped(Exception):
    pass


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Each allocation once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def held(patches: Iterable[TensorPatch]) -> int:
    return bytes_of(t for patch in patches for t in (*patch.values.values(), *patch.originals.values()))


def run_of(model: nn.Module, turns: Iterable[list[str]]) -> tuple[list[TensorPatch], list[dict[str, Any]]]:
    patches: list[TensorPatch] = []
    states = [state_of(model)]
    for number, names in enumerate(turns):
        patch = write_tensors(model, new_values(model, seed=number, names=names))
        continues_tensors(patch, patches)
        patches.append(patch)
        states.append(state_of(model))
    return patches, states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_is_reverted_bit_for_bit_with_one_set_of_originals(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    names = some_names(model)
    assert len(names) >= 4
    patches, states = run_of(model, [names[:3], names[2:], names[1:], names])
    values = bytes_of(t for patch in patches for t in patch.values.values())
    assert held(patches) == values + sum(model.get_parameter(name).nbytes for name in names)
    for patch in reversed(patches):
        states.pop()
        patch.revert(model)
        assert_same_state(states[-1], state_of(model))
    assert len(states) == 1


def test_what_something_else_wrote_in_between_is_held_apart() -> None:
    model = tiny_model()
    names = some_names(model)[:2]
    patches, _ = run_of(model, [names])
    with torch.no_grad():
        model.get_parameter(names[0]).add_(1)
    changed = state_of(model)
    last = write_tensors(model, new_values(model, seed=5, names=names))
    continues_tensors(last, patches)
    assert last.originals[names[0]] is not patches[0].values[names[0]]
    assert last.originals[names[1]] is patches[0].values[names[1]]
    last.revert(model)
    assert_same_state(changed, state_of(model))


def test_after_one_that_was_taken_back_a_run_goes_on() -> None:
    model = tiny_model()
    names = some_names(model)[:2]
    patches, states = run_of(model, [names, names])
    patches[1].revert(model)
    third = write_tensors(model, new_values(model, seed=7, names=names))
    continues_tensors(third, [*patches])
    assert third.originals[names[0]] is not patches[1].values[names[0]]
    third.revert(model)
    assert_same_state(states[1], state_of(model))


def test_a_run_is_merged_saved_and_applied_again(tmp_path: Path) -> None:
    model = tiny_model()
    names = some_names(model)
    patches, states = run_of(model, [names[:3], names])
    merge_tensors(patches).save(tmp_path / "p.safetensors", keep_originals=True)
    for patch in reversed(patches):
        patch.revert(model)
    loaded = TensorPatch.load(tmp_path / "p.safetensors")
    loaded.apply(model)
    assert_same_state(states[-1], state_of(model))
    TensorPatch.load(tmp_path / "p.safetensors").revert(model)
    assert_same_state(states[0], state_of(model))


# ---------------------------------------------------------------- editors, comparisons


@pytest.mark.parametrize("method", ["MoE-FT", "MoE-FT-L", "UnKE"])
def test_sequential_edits_grow_by_what_each_wrote(method: str) -> None:
    """One set of originals, whatever the number of edits; and they are undone to the first bit."""
    editor = MoEEditor(settings(method), tiny_model(), TOK)
    before = state_of(editor.model)
    for fact in requests(6):
        editor.edit_requests([fact], sequential_edit=True, verbose=False)
    values = bytes_of(t for patch in editor.patches for t in patch.values.values())
    names = {name for patch in editor.patches for name in patch.values}
    assert len(editor.patches) == 6
    assert held(editor.patches) == values + sum(editor.model.get_parameter(name).nbytes for name in names)
    editor.undo(6)
    assert_same_state(before, state_of(editor.model))


def alive(model: nn.Module) -> int:
    """Bytes of all tensors that look like a parameter of the model and are none."""
    gc.collect()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters() if p.dim() == 3}
    things = (t for t in gc.get_objects() if type(t) is torch.Tensor and tuple(t.shape) in shapes)
    return bytes_of(t for t in things if t.untyped_storage().data_ptr() not in own)


def test_a_comparison_holds_what_it_needs_to_go_back_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny_model(), []
    right = TrainingEditor.edit_batch

    def watched(self: TrainingEditor, net: nn.Module, *rest: object) -> object:
        seen.append(alive(net))
        return right(self, net, *rest)

    monkeypatch.setattr(TrainingEditor, "edit_batch", watched)
    before = state_of(model)
    judged = tuple(EvaluationRecord(fact, (), ()) for fact in facts(6))
    compare(Task(model, TOK, judged, "counterfact", 1, {}), [settings("MoE-FT")], progress=False)
    assert len(seen) == 6
    assert max(seen[2:]) == seen[2], "from the second edit on as much as after it"
    assert_same_state(before, state_of(model))


def test_a_failure_takes_a_run_back_whoever_holds_its_patches() -> None:
    model = tiny_model().to(torch.bfloat16)
    before, names, kept = state_of(model), some_names(model), []
    with suppress(Stopped), intact(model) as hold:
        run = AppliedRun(model, hold)
        for number in range(5):
            patch = write_tensors(model, new_values(model, seed=number, names=names[number % 3 :]))
            run.add(patch)
            kept += [patch] if number % 2 else []
        del patch
        assert len(hold.undo) == 1
        raise Stopped
    assert_same_state(before, state_of(model))
    assert not any(patch.applied for patch in kept)
    run.restore()
    assert_same_state(before, state_of(model))
