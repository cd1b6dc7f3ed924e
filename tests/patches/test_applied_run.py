"""However many batches follow each other, one copy of what they changed is held, and all of it comes back."""

from __future__ import annotations

import gc
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from planted_patches import new_values, write, write_tensors
from solving_editors import TOK, plain_ridge
from tiny import assert_same_state, facts, state_of, tiny_model
from torch import nn

from easyedit_moe.comparison.compare import compare
from easyedit_moe.comparison.task import Task
from easyedit_moe.editors.solving import SolvingEditor
from easyedit_moe.facts.records import EvaluationRecord
from easyedit_moe.moe.holding import intact
from easyedit_moe.patches.applied_run import AppliedRun
from easyedit_moe.workflow.edit import edit

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = ["qwen3_moe", "gpt_oss", "modulelist"]
TURNS = [(0, 1, 2), (2, 3), (1, 2, 3), (0, 3)]


class Stopped(Exception):
    pass


def originals_alive(model: nn.Module) -> int:
    """Bytes of all matrices of an expert's down-projection that live outside the model."""
    gc.collect()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape[-2:]) for n, p in model.named_parameters() if "down_proj" in n}
    shapes |= {shape[::-1] for shape in shapes}
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and type(thing) is torch.Tensor and tuple(thing.shape[-2:]) in shapes:
            storage = thing.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_one_copy_is_held_and_a_failure_takes_all_back(family: str) -> None:
    model = tiny_model(family)
    before, held = state_of(model), []
    start = originals_alive(model)
    with suppress(Stopped), intact(model) as hold:
        run = AppliedRun(model, hold)
        for number in range(9):
            run.add(write(model, seed=number, experts=TURNS[number % 4]))
            held.append(originals_alive(model) - start)
        assert len(hold.undo) == 1
        raise Stopped
    assert max(held[3:]) == held[3] > held[0]
    assert_same_state(before, state_of(model))
    run.restore()
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("added", [True, False])
def test_what_lies_between_patches_and_an_edit_that_was_not_added_come_back_too(added: bool) -> None:
    model = tiny_model().to(torch.bfloat16)
    before = state_of(model)
    with suppress(Stopped), intact(model) as hold:
        run = AppliedRun(model, hold)
        run.add(write(model, experts=(0, 1)))
        whole = write_tensors(model, new_values(model, seed=3))
        run.add(whole)
        last = write(model, seed=4, experts=(1, 2))
        if added:
            run.add(last)
        raise Stopped
    assert_same_state(before, state_of(model))


def test_the_run_is_the_one_of_the_workflow_and_of_comparisons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some batches, no more matrices are held than the run changed."""
    model, seen = tiny_model(), []
    right = SolvingEditor.edit_batch

    def watched(self: SolvingEditor, net: nn.Module, *rest: object) -> object:
        seen.append(originals_alive(net))
        return right(self, net, *rest)

    monkeypatch.setattr(SolvingEditor, "edit_batch", watched)
    hp = plain_ridge(tmp_path, "Global", v_num_grad_steps=1)
    before = state_of(model)
    report = edit(facts(6), (model, TOK), hparams=hp, batch_size=1, progress=False)
    held = [(n, some) for patch in report.patches for n, some in patch.originals.items()]
    kept = {(n, e): w.nbytes for n, some in held for e, w in some.items()}
    assert len(kept) == sum(len(some) for _, some in held)
    assert len(seen) == 6
    assert 0 < seen[5] - seen[0] <= sum(kept.values())
    for patch in reversed(report.patches):
        patch.revert(model)
    assert_same_state(before, state_of(model))
    del report, patch
    held.clear()
    seen.clear()
    judged = tuple(EvaluationRecord(fact, (), ()) for fact in facts(6))
    compare(Task(model, TOK, judged, "counterfact", 1, {}), [hp], progress=False)
    assert len(seen) == 6
    assert 0 < seen[5] - seen[0] <= sum(kept.values())
    assert_same_state(before, state_of(model))
