"""Facts that lie at one token: they are grouped, and one target serves all of a group."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from solving_editors import TOK
from tiny import tiny_model

from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.moe.capture import capture_facts
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.targets.cache import cached_targets
from easyedit_moe.targets.joining import joined_facts
from easyedit_moe.targets.search import TargetSearch, TargetSettings, TargetVectors, fact_contexts

SETTINGS = TargetSettings(30, 0.5, 0.0, 0.0, 8.0, 0.0, 256, "subject_last")


def fact(prompt: str, target: str, subject: str = "Alice") -> EditRequest:
    return EditRequest(prompt, subject, target)


def test_groups_are_by_place_the_batch_before_what_was_earlier() -> None:
    lives, speaks, works = fact("Alice lives in", "Rome"), fact("Alice speaks", "Greek"), fact("Alice works in", "Oslo")
    other = fact("Bob lives in", "Rome", "Bob")
    earlier = {(1,): {works.prompt: works, lives.prompt: fact("Alice lives in", "Paris")}, (3,): {"x": other}}
    found = joined_facts([lives, other, speaks], [(1,), (2,), (1,)], earlier)
    assert found.facts == [[lives, speaks, works], [other]]
    assert found.numbers == [0, 1, 0]
    assert joined_facts([lives, other, speaks], (), earlier).facts == [[lives], [other], [speaks]]


def test_one_shift_serves_all_facts_beside_each_other(tmp_path: Path) -> None:
    view = MoELayerView(tiny_model())
    search = TargetSearch(view, TOK, 1, (), SETTINGS, progress=False, warn=False)
    lives, speaks = fact("Alice lives in", "Rome"), fact("Alice speaks", "Greek")
    joined = search.find([lives], beside=[[speaks]])
    alone = search.find([lives])
    assert float((joined.delta - alone.delta).norm()) > 1e-2
    # The objective is the sum over both facts, so either order finds the same.
    swapped = search.find([speaks], beside=[[lives]])
    torch.testing.assert_close(joined.initial_nll, swapped.initial_nll)
    torch.testing.assert_close(joined.delta, swapped.delta, rtol=1e-2, atol=1e-2)
    both = search.find([lives, speaks])
    torch.testing.assert_close(joined.initial_nll[0], both.initial_nll.mean())
    assert float(joined.final_nll) < float(joined.initial_nll)
    name, print_ = "tiny", model_fingerprint(view)
    first = cached_targets(tmp_path, name, print_, search, [lives], [[speaks]])
    assert torch.equal(first.delta, joined.delta)
    assert torch.equal(cached_targets(tmp_path, name, print_, search, [lives], [[speaks]]).delta, first.delta)
    assert torch.equal(cached_targets(tmp_path, name, print_, search, [lives]).delta, alone.delta), "another key"


def test_a_fact_beside_others_weighs_as_much_as_alone() -> None:
    """The mean over facts would stop early with one of several far from its target."""
    view = MoELayerView(tiny_model())
    asked = [fact("Alice lives in", "Rome"), fact("Alice speaks", "Greek"), fact("Alice works in", "Oslo")]

    def found(**changes: float) -> TargetVectors:
        search = TargetSearch(view, TOK, 1, (), replace(SETTINGS, **changes), progress=False, warn=False)
        return search.find(asked[:1], beside=[asked[1:]])

    mean = float(found().initial_nll)
    assert int(found(early_stop_loss=2 * mean).steps) > 0, "one of them may be far from its target still"
    assert int(found(early_stop_loss=3.01 * mean).steps) == 0


@pytest.mark.parametrize("clamp", [0.3, 1.0])
def test_the_clamp_is_of_the_way_from_the_first_state(clamp: float, tmp_path: Path) -> None:
    view, settings = MoELayerView(tiny_model()), replace(SETTINGS, clamp_norm_factor=clamp)
    search = TargetSearch(view, TOK, 1, (), settings, progress=False, warn=False)
    one = fact("Alice lives in", "Rome")
    (context,) = fact_contexts(TOK, one, (), "subject_last")
    state = capture_facts(view, [context.ids], [context.fact], [], [1], 0).outputs[1][0]
    plain, same = search.find([one]), search.find([one], first=[state])
    torch.testing.assert_close(plain.delta, same.delta, rtol=1e-2, atol=1e-3)
    assert float(plain.delta.norm()) == pytest.approx(clamp * float(state.norm()), rel=1e-3), "it reaches the clamp"
    first = state + 3 * state.norm() * torch.nn.functional.normalize(torch.randn_like(state), dim=0)
    found = search.find([one], first=[first])
    way = state + found.delta[0] - first
    assert float(way.norm()) <= clamp * float(first.norm()) * (1 + 1e-4)
    assert (found.delta - plain.delta).norm() > 0.1
    name, print_ = "tiny", model_fingerprint(view)
    kept = cached_targets(tmp_path, name, print_, search, [one], first=[first])
    assert torch.equal(kept.delta, found.delta)
    assert torch.equal(cached_targets(tmp_path, name, print_, search, [one]).delta, plain.delta), "another key"
