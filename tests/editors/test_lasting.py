"""Options for long runs: each does what it says of a layer, and carries its state in the memory, as a value."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from solving_editors import TOK, captured, hparams, plain_ridge, stacked
from tiny import tiny_model
from torch import Tensor

from easyedit_moe.algebra.exact import solve_exact
from easyedit_moe.algebra.hypersphere import principal_directions
from easyedit_moe.algebra.metric import IdentityMetric
from easyedit_moe.algebra.preservation import preservation_loss
from easyedit_moe.algebra.routed_keys import RoutedKeys
from easyedit_moe.editors import make_editor
from easyedit_moe.editors.memory import COMPACT, EditMemory, Remembered
from easyedit_moe.errors import HyperParamsError
from easyedit_moe.evaluation.scoring import score_targets
from easyedit_moe.facts.requests import parse_requests
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.statistics.gather import fresh_statistics

SOLVERS = ["Global", "MoTE", "MoEEdit-BCD", "MoE-MEMIT"]
NAMES = ["Alice", "Bob", "Carol", "Dave", "Erin", "Frank"]


def facts(*targets: str, prompt: str = "{} lives in", names: list[str] = NAMES) -> list[dict[str, Any]]:
    return [
        {"prompt": prompt.format(name), "subject": name, "target_new": target}
        for name, target in zip(names, targets, strict=False)
    ]


def run(hp: Any, *batches: list[dict[str, Any]]) -> tuple[Any, list[Any], list[dict[int, Tensor]]]:
    """The model after all batches, the memory after each, and the layers' weights before the first and after each."""
    model, editor, memories = tiny_model(), make_editor(hp, progress=False), [None]
    weights = [{layer: stacked(model, layer) for layer in hp.layers}]
    for batch in batches:
        memories.append(editor.edit(model, TOK, parse_requests(batch), memories[-1]).memory)
        weights.append({layer: stacked(model, layer) for layer in hp.layers})
    return model, memories[1:], weights


# ---------------------------------------------------------------- each option


@pytest.mark.parametrize("method", SOLVERS)
def test_no_expert_grows_beyond_its_anchor(method: str, data: Path) -> None:
    strong = {"v_lr": 1.0, "lambda_reg": 1e-4, "clamp_norm_factor": 50}
    batches = [facts("Rome", "Paris"), facts("Oslo", "Rome"), facts("Paris", "Oslo")]
    free, bound = hparams(data, method, **strong), hparams(data, method, norm_anchor=1.02, **strong)
    _, _, loose = run(free, *batches)
    _, memories, held = run(bound, *batches)
    for layer in bound.layers:
        first = loose[0][layer].flatten(1).norm(dim=1)
        assert (loose[-1][layer].flatten(1).norm(dim=1) > 1.05 * first).any()
        assert (held[-1][layer].flatten(1).norm(dim=1) <= 1.02 * first * (1 + 1e-5)).all()
        torch.testing.assert_close(memories[-1].carried.layers[layer].norms, first, rtol=1e-6, atol=1e-6)
    assert not torch.equal(held[-1][2], held[0][2])


@pytest.mark.parametrize("method", SOLVERS)
def test_updates_have_nothing_along_principal_directions(method: str, data: Path) -> None:
    _, _, weights = run(hparams(data, method, sphere_energy=0.5), facts("Rome", "Paris"), facts("Oslo"))
    _, _, without = run(hparams(data, method), facts("Rome", "Paris"), facts("Oslo"))
    for layer in (1, 2):
        for expert, (before, after, other) in enumerate(
            zip(weights[0][layer], weights[-1][layer], without[-1][layer], strict=True)
        ):
            along = principal_directions(before, 0.5)
            change = after - before
            assert float((change @ along).norm()) <= 1e-5 * (1 + float(change.norm())), expert
            if (other - before).norm() > 1e-3:
                assert ((other - before) @ along).norm() > 1e-4


@pytest.mark.parametrize("method", SOLVERS)
def test_the_ridge_grows_with_the_queue_of_the_preservation_loss(method: str, data: Path) -> None:
    hp = hparams(data, method, preservation_bound=1e-6)
    _, memories, weights = run(hp, facts("Rome", "Paris"), facts("Oslo", "Rome"))
    _, _, plain = run(hparams(data, method), facts("Rome", "Paris"), facts("Oslo", "Rome"))
    editor = make_editor(hp, progress=False)
    prepared = editor.prepare(tiny_model(), TOK)
    for layer in hp.layers:
        states = [memory.carried.layers[layer] for memory in memories]
        assert 1 < states[0].queue < states[1].queue
        moments, counts = prepared.layers[layer].needed_moments()
        drift = weights[1][layer] - weights[0][layer]
        loss = preservation_loss(drift, moments, counts) / preservation_loss(weights[0][layer], moments, counts)
        assert states[0].queue == pytest.approx(1 + (loss - 1e-6) / 1e-6, rel=1e-3)
        torch.testing.assert_close(
            states[1].drift.double(), weights[2][layer] - weights[0][layer], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(weights[1][layer], plain[1][layer], rtol=1e-5, atol=1e-6)
        moved, freely = ((some[2][layer] - some[1][layer]).norm() for some in (weights, plain))
        assert moved < 0.9 * freely
    _, wide, same = run(hparams(data, method, preservation_bound=1e6), facts("Rome", "Paris"), facts("Oslo", "Rome"))
    assert wide[-1].carried.layers[2].queue == 1
    torch.testing.assert_close(same[2][2], plain[2][2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", SOLVERS)
def test_residuals_are_normalised_by_those_of_all_batches(method: str, data: Path) -> None:
    batches = [facts("Rome", "Paris", "Oslo"), facts("Paris", "Rome", names=NAMES[3:])]
    _, memories, weights = run(hparams(data, method, sequence_rate=1.0), *batches)
    _, _, plain = run(hparams(data, method), *batches)
    for memory, count in zip(memories, (3, 5), strict=True):
        state = memory.carried.layers[2]
        assert float(state.residuals.count) == count
        assert float(state.keys.count.sum()) == 3 * count, "three experts a token"
    assert (weights[-1][2] - plain[-1][2]).norm() > 1e-3
    _, _, twice = run(hparams(data, method, sequence_rate=2.0, layers=[2]), batches[0])
    _, _, once = run(hparams(data, method, sequence_rate=1.0, layers=[2]), batches[0])
    torch.testing.assert_close(twice[1][2] - twice[0][2], 2 * (once[1][2] - once[0][2]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["Global", "MoE-MEMIT"])
def test_statistics_are_read_again_on_the_edited_model(method: str, data: Path) -> None:
    hp = hparams(data, method, refresh_every=2, layers=[1, 2])
    model, editor, memory = tiny_model(), make_editor(hp, progress=False), None
    kept = []
    for batch in (facts("Rome"), facts("Oslo"), facts("Paris"), facts("Rome", "Paris")):
        edited = {layer: fresh_statistics(MoELayerView(model), TOK, hp, [1, 2], "x", False)[layer] for layer in (1, 2)}
        memory = editor.edit(model, TOK, parse_requests(batch), memory).memory
        kept.append((memory.carried.refreshed, memory.carried.prepared, edited))
    assert [one[0] for one in kept] == [0, 0, 2, 2]
    assert kept[1][1] is None
    new, old = kept[2][1], editor.prepare(tiny_model(), TOK)
    assert kept[3][1] is new
    x = torch.randn(stacked(model, 2).shape[-1], 3).double()
    assert (new.layers[2].metric.apply(0, x) - old.layers[2].metric.apply(0, x)).norm() > 1e-6
    # What the first layer is given does not change, so neither do its keys.
    torch.testing.assert_close(new.layers[1].metric.apply(0, x), old.layers[1].metric.apply(0, x), rtol=1e-5, atol=1e-6)
    assert new.layers[2].coverage.tolist() == kept[2][2][2].counts.tolist()


# ---------------------------------------------------------------- all current facts at once


def test_batches_end_where_all_current_facts_at_once_would(data: Path) -> None:
    """Global on one layer: the weights are the base plus the minimiser over every current fact's row."""
    hp = plain_ridge(data, "Global", layers=[1], lambda_reg=0.05, remember_edits=True, cumulative_ridge=True, v_lr=0.5)
    batches = [facts("Rome", "Paris"), facts("Oslo", names=NAMES[2:]), facts("Paris"), facts("Rome", "Oslo", "Rome")]
    _, memories, weights = run(hp, *batches)
    rows = memories[-1].rows(1)
    assert len(rows) == 3
    keys = RoutedKeys.cat(list(rows.values()))
    wanted = torch.cat([solve.wanted_of(1, fact) for solve, fact in rows])
    expected = solve_exact(keys, wanted, 0.05, IdentityMetric()).dense(8)
    torch.testing.assert_close(weights[-1][1] - weights[0][1], expected.double(), rtol=1e-3, atol=1e-5)
    assert expected.norm() > 0.1


@pytest.mark.parametrize("method", SOLVERS)
def test_editing_the_same_facts_again_and_again_does_not_make_weights_grow(method: str, data: Path) -> None:
    batches = [facts(one, two) for one, two in pairwise(["Rome", "Paris", "Oslo"] * 4)]
    ridge = 30.0 if method == "MoE-MEMIT" else 0.3  # strong enough to hold the first batch back
    sizes = {}
    for cumulative in (False, True):
        settings = {"cumulative_ridge": cumulative, "lambda_reg": ridge, "layers": [2]}
        hp = hparams(data, method, remember_edits=True, v_lr=0.5, **settings)
        _, _, weights = run(hp, *batches)
        sizes[cumulative] = [float((one[2] - weights[0][2]).norm()) for one in weights[1:]]
    assert sizes[True][0] == pytest.approx(sizes[False][0], rel=1e-3)
    assert sizes[True][-1] < 0.9 * sizes[False][-1]


@pytest.mark.parametrize("method", SOLVERS)
def test_targets_do_not_walk_away_from_the_first_state(method: str, data: Path) -> None:
    """The state that is kept is that of the unedited model, however often the fact is edited."""
    batches = [facts(one) for one in ("Rome", "Paris", "Oslo", "Rome", "Paris", "Oslo")]
    short = {"clamp_norm_factor": 0.5, "v_lr": 1.0, "lambda_reg": 1e-4, "layers": [1], "remember_edits": True}
    ways = {}
    for anchored in (False, True):
        hp = hparams(data, method, anchor_targets=anchored, **short)
        model, memories, _ = run(hp, *batches)
        _, first = captured(tiny_model(), hp, 1, batches[0])
        _, last = captured(model, hp, 1, batches[0])
        ways[anchored] = float((last - first).norm() / first.norm())
        if anchored:
            assert [len(memory.carried.first) for memory in memories] == [1] * 6
            (kept,) = memories[-1].carried.first.values()
            torch.testing.assert_close(kept, first[0].float())
    assert ways[True] < 0.55 < ways[False]


# ---------------------------------------------------------------- facts at one token


@pytest.mark.parametrize("method", SOLVERS)
def test_facts_at_one_token_are_written_together(method: str, data: Path) -> None:
    settings = {"remember_edits": True, "lambda_reg": 1e-6, "layers": [2]}
    hp = hparams(data, method, join_facts=True, **settings)
    same = facts("Rome"), facts("Greek", prompt="{} speaks")
    model, editor = tiny_model(), make_editor(hp, progress=False)
    both = editor.edit(model, TOK, parse_requests([*same[0], *same[1]]))
    assert torch.equal(both.targets[0].delta[0], both.targets[0].delta[1])
    (place,) = both.memory.carried.joined
    assert [one.target_new for one in both.memory.carried.joined[place].values()] == ["Rome", "Greek"]
    assert both.diagnosis.facts[0].residual_share > 0.9
    assert sum(keys.num_tokens for keys in both.memory.keys[2]) == 1, "they have one key"
    later = editor.edit(model, TOK, parse_requests(facts("Oslo", prompt="{} works in")), both.memory)
    assert len(later.memory.carried.joined[place]) == 3
    assert later.diagnosis.facts[0].residual_share > 0.9, "the key of the others is not held against it"
    plain = make_editor(hparams(data, method, **settings), progress=False)
    model = tiny_model()
    first = plain.edit(model, TOK, parse_requests([*same[0], *same[1]]))
    held = plain.edit(model, TOK, parse_requests(facts("Oslo", prompt="{} works in")), first.memory)
    assert held.diagnosis.facts[0].residual_share < 0.7, "without the option it is"


@pytest.mark.parametrize("method", ["Global", "MoTE", "MoEEdit-BCD"])
def test_a_prompt_edited_five_times_says_each_target_in_turn(method: str, data: Path) -> None:
    """Not only the state that a solver aims at: what the model says after each of the five edits."""
    found = {"v_num_grad_steps": 40, "v_lr": 0.5, "clamp_norm_factor": 30, "v_weight_decay": 0.0, "kl_factor": 0.0}
    settings = {"layers": [1], "remember_edits": True, "metric": "identity", "lambda_reg": 1e-6, "fact_token": "last"}
    wide = {"rank_in": 1.0, "whitening": "none"} if method == "MoTE" else {}
    editor, memory = make_editor(hparams(data, method, **settings, **found, **wide), progress=False), None
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight *= 5  # loud enough for any answer to become the likely one
    for target in ("Rome", "the", "is", "and", "Rome"):
        (fact,) = parse_requests(facts(target))
        memory = editor.edit(model, TOK, [fact], memory).memory
        assert score_targets(model, TOK, [(fact.prompt, target)])[0].exact, target
        assert sum(keys.num_tokens for keys in memory.keys[1]) == 1


# ---------------------------------------------------------------- the memory


def test_a_memory_lets_go_of_keys_that_no_fact_has_any_more() -> None:
    def solve(number: int) -> Remembered:
        keys = RoutedKeys(torch.zeros(2, 1).long(), torch.ones(2, 1), torch.full((2, 1, 3), float(number)))
        return Remembered(("a", f"b{number % 5}"), {0: keys}, wanted={0: torch.full((2, 4), float(number))})

    memory, earlier = EditMemory(), []
    for number in range(5 * COMPACT):
        earlier.append((memory, dict(memory.rows(0))))
        memory = memory.extended([solve(number)], 2)
        assert len(memory._log) < 2 * COMPACT
    last = 5 * COMPACT - 1
    values = {
        s.prompts[f]: (float(k.key[0, 0, 0]), float(s.wanted_of(0, f)[0, 0])) for (s, f), k in memory.rows(0).items()
    }
    assert values == {"a": (last, last)} | {f"b{n % 5}": (n, n) for n in range(last - 4, last + 1)}
    for one, rows in earlier:
        assert one.rows(0).keys() == rows.keys(), "a memory of before stays as it was"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("norm_anchor", 0.9), ("preservation_bound", 0.0), ("sequence_rate", -1.0), ("sphere_energy", 0.0),
        ("sphere_strength", 2.0), ("refresh_every", 0), ("cumulative_ridge", True),
    ],
)  # fmt: skip
def test_settings_out_of_range(setting: str, value: Any, data: Path) -> None:
    with pytest.raises(HyperParamsError, match=setting):
        hparams(data, **{setting: value})
    with pytest.raises(HyperParamsError, match="statistics"):
        plain_ridge(data, preservation_bound=0.1)
    with pytest.raises(HyperParamsError, match="spread update"):
        hparams(data, "Global/update", cumulative_ridge=True, remember_edits=True)
