"""Earlier facts that are edited again with a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from solving_editors import TOK, hparams, plain_ridge, stacked
from tiny import tiny_model
from torch import Tensor

from easyedit_moe.editors import make_editor
from easyedit_moe.editors.planner import plan
from easyedit_moe.editors.replay import facts_to_replay
from easyedit_moe.editors.stages import Stage
from easyedit_moe.errors import HyperParamsError
from easyedit_moe.evaluation.scoring import score_targets
from easyedit_moe.facts.requests import EditRequest, parse_requests
from easyedit_moe.moe.shapes import shapes_of

pytestmark = pytest.mark.filterwarnings("ignore::easyedit_moe.errors.EditingWarning")
SOLVERS = ["Global", "MoTE", "MoEEdit-BCD", "MoE-MEMIT"]


def facts(prompt: str = "{} lives in", **targets: str) -> list[EditRequest]:
    made = [{"prompt": prompt.format(name), "subject": name, "target_new": to} for name, to in targets.items()]
    return parse_requests(made)


FIRST = facts(Alice="Rome", Bob="Paris", Carol="Oslo")
SECOND = facts(Dave="Oslo", Erin="Rome")


def weights(hp: Any, *steps: Any, targets: Any = None) -> tuple[dict[int, Tensor], Any, Any]:
    """The layers' weights after all batches, and the last result; ``targets`` are for the last batch."""
    model, editor, memory, result = tiny_model(), make_editor(hp, progress=False), None, None
    for number, batch in enumerate(steps):
        given = targets if number == len(steps) - 1 else None
        result = editor.edit(model, TOK, batch, memory, given)
        memory = result.memory
    return {layer: stacked(model, layer) for layer in hp.layers}, result, model


@pytest.mark.parametrize("changes", [{}, {"join_facts": True}, {"remember_edits": False}, {"cumulative_ridge": True}])
@pytest.mark.parametrize("method", SOLVERS)
def test_it_is_as_if_the_drawn_facts_were_in_the_batch(method: str, changes: dict[str, Any], data: Path) -> None:
    hp = hparams(data, method, **({"remember_edits": True} | changes))
    replaying = hparams(data, method, **({"remember_edits": True, "replay_facts": 2} | changes))
    _, before, _ = weights(replaying, FIRST)
    drawn = facts_to_replay(before.memory.carried.joined, SECOND, (), 2, 3, hp.join_facts)
    assert len(drawn) == 2
    assert {one.prompt for one in drawn} < {one.prompt for one in FIRST}
    found, result, _ = weights(replaying, FIRST, SECOND)
    expected, _, _ = weights(hp, FIRST, [*SECOND, *drawn])
    for layer in hp.layers:
        torch.testing.assert_close(found[layer], expected[layer], rtol=0, atol=1e-6)
    assert [one.prompt for one in result.diagnosis.facts] == [one.prompt for one in SECOND]
    assert len(result.targets[0].delta) == len(SECOND)
    assert result.memory.edits == len(FIRST) + len(SECOND), "a replayed fact is no new edit"
    if hp.remember_edits:
        assert len(result.memory.rows(2)) == len(FIRST) + len(SECOND), "and is held once"


def test_given_targets_are_those_of_the_new_facts(data: Path) -> None:
    hp = hparams(data, replay_facts=2)
    expected, result, _ = weights(hp, FIRST, SECOND)
    found, again, _ = weights(hp, FIRST, SECOND, targets=result.targets[0])
    for layer in hp.layers:
        torch.testing.assert_close(found[layer], expected[layer], rtol=0, atol=1e-5)
    assert torch.equal(again.targets[0].delta, result.targets[0].delta)


def test_what_a_batch_supersedes_is_not_drawn() -> None:
    places = {fact.prompt: (number,) for number, fact in enumerate(FIRST)}
    other = parse_requests([{"prompt": "Alice speaks", "subject": "Alice", "target_new": "Thai"}])[0]
    earlier = {places[fact.prompt]: {fact.prompt: fact} for fact in FIRST}
    earlier[0,] = {**earlier[0,], other.prompt: other}
    again = facts(Alice="Lima")
    apart = facts_to_replay(earlier, again, [(0,)], 9, 0, False)
    assert sorted(one.prompt for one in apart) == ["Alice speaks", "Bob lives in", "Carol lives in"]
    joined = facts_to_replay(earlier, again, [(0,)], 9, 0, True)
    assert sorted(one.prompt for one in joined) == ["Bob lives in", "Carol lives in"]
    some = [facts_to_replay(earlier, again, [(0,)], 2, seed, False) for seed in range(20)]
    assert all(len({one.prompt for one in drawn}) == 2 for drawn in some)
    assert {one.prompt for drawn in some for one in drawn} == {one.prompt for one in apart}
    assert facts_to_replay(earlier, again, [(0,)], 2, 7, False) == some[7]


def test_what_later_batches_undo_comes_back(data: Path) -> None:
    weak = {"v_num_grad_steps": 60, "v_lr": 0.2, "clamp_norm_factor": 100, "lambda_reg": 1e-6, "early_stop_loss": 0.05}
    where = "The home of {}"
    first = facts(where, Alice="Rome", Bob="Paris", Carol="Oslo")
    steps = [first, *(facts(where, Dave=one, Erin=one, Frank=one) for one in ("Oslo", "Paris", "Rome"))]
    asked = [(first[0].prompt, first[0].target_new)]  # what a model of random weights can be made to say
    undone, replayed = (
        score_targets(weights(plain_ridge(data, replay_facts=count, **weak), *steps)[2], TOK, asked)[0].nll
        for count in (0, 3)
    )
    reached = score_targets(weights(plain_ridge(data, **weak), first)[2], TOK, asked)[0].nll
    assert replayed < reached + 0.1 < undone - 0.3


def test_a_plan_counts_them(data: Path) -> None:
    shapes = shapes_of(tiny_model(), [1, 2])

    def stages(edits: int, earlier: int, **changes: Any) -> list[Stage]:
        found = plan(shapes, hparams(data, **changes), edits, earlier).stages
        return [stage for stage in found if not stage.name.startswith("carried")]

    plain, more, as_edits = stages(4, 100), stages(4, 100, replay_facts=8), stages(12, 92)
    assert [stage.working for stage in more] == [stage.working for stage in as_edits]
    assert sum(stage.working for stage in more) > sum(stage.working for stage in plain)
    assert stages(4, 0, replay_facts=8) == stages(4, 0)


def test_bad_values(data: Path) -> None:
    with pytest.raises(HyperParamsError, match="replay_facts must be at least 0"):
        hparams(data, replay_facts=-1)
    with pytest.raises(HyperParamsError, match=r"replay_facts must be 0 where edits_per_solve"):
        hparams(data, "MoE-ROME", replay_facts=1)
