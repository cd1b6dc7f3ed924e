from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from solving_editors import (
    METHODS,
    TOK,
    VARIANTS,
    add,
    captured,
    changed_parameters,
    check_equal,
    dense_ridge,
    down_projections,
    edit,
    hparams,
    plain_ridge,
    stacked,
)
from tiny import FAMILIES, TEXTS, assert_same_state, facts, requests, state_of, tiny_model
from torch import Tensor, nn

import easyedit_moe
from easyedit_moe import editors
from easyedit_moe.algebra.bcd import expert_orders, solve_bcd
from easyedit_moe.algebra.core import solve_core
from easyedit_moe.algebra.core_update import expand_core
from easyedit_moe.editors import (
    EditMemory,
    Editor,
    GlobalEditor,
    MoEEditEditor,
    MoTEEditor,
    editor_class,
    make_editor,
    method_names,
    solving,
)
from easyedit_moe.editors.prepared import Prepared
from easyedit_moe.errors import (
    CoverageWarning,
    DataError,
    DenseModelError,
    HyperParamsError,
    LayerError,
    MethodError,
    NumericalError,
    RequestError,
)
from easyedit_moe.facts.requests import parse_requests
from easyedit_moe.hparams import MoEHyperParams, hyperparams_class, presets
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches.weights import WeightPatch
from easyedit_moe.statistics.gather import layer_statistics
from easyedit_moe.statistics.moments import LayerMoments

APPLY = {
    "MoTE": editors.apply_mote_to_model, "MoEEdit-BCD": editors.apply_moeedit_to_model,
    "BCD+speedup": editors.apply_bcd_speedup_to_model, "Global": editors.apply_global_to_model,
    "Global+speedup": editors.apply_global_speedup_to_model, "MoE-MEMIT": editors.apply_moe_memit_to_model,
    "MoE-AlphaEdit": editors.apply_moe_alphaedit_to_model, "MoE-ROME": editors.apply_moe_rome_to_model,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("no_editing_warnings")


def fact_output(model: nn.Module, layer: int, facts: Sequence[dict[str, str]]) -> Tensor:
    """Output of a layer at each fact token, one plain forward per prompt."""
    states = []
    for fact in facts:
        out = TOK(fact["prompt"], return_offsets_mapping=True)
        end = fact["prompt"].index(fact["subject"]) + len(fact["subject"])
        at = [i for i, (a, b) in enumerate(out["offset_mapping"]) if a < end <= b][-1]
        hook = model.model.layers[layer].register_forward_hook(
            lambda _, __, out, at=at: states.append((out if isinstance(out, Tensor) else out[0])[0, at])
        )
        with torch.no_grad():
            model(torch.tensor([out["input_ids"]]))
        hook.remove()
    return torch.stack(states).float()


# ---------------------------------------------------------------- what every method does


def check_one_edit(model: nn.Module, hp: MoEHyperParams, shrink: float) -> None:
    """Only the chosen down-projections change, the fact token moves towards z, and a revert leaves no trace."""
    facts = requests(1 if hp.alg_name == "MoE-ROME" else 3)
    before, last = state_of(model), hp.layers[-1]
    h = fact_output(model, last, facts)
    result = edit(model, hp, facts)
    moved = fact_output(model, last, facts)
    wanted = h + result.targets[0].delta
    assert result.targets[0].delta.norm(dim=1).min() > 0.1
    left = (wanted - moved).norm(dim=1) / (wanted - h).norm(dim=1)
    assert (left < shrink).all(), left
    after = state_of(model)
    assert changed_parameters(before, model) <= down_projections(model, hp.layers)
    written = hp.layers[-1:] if hp.spread == "last" else hp.layers
    for layer in written:
        assert changed_parameters(before, model) & down_projections(model, [layer])
    for part in ("requires_grad", "grad", "training", "hooks", "forward"):
        assert before[part] == after[part], part
    assert result.patch.layers == written
    assert all(r.rounding_loss < 0.01 and r.update_norm > 0 for r in result.patch.reports)
    result.patch.revert(model)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_method(variant: str, data: Path) -> None:
    check_one_edit(tiny_model(), hparams(data, variant), shrink=0.95)


@pytest.mark.parametrize("variant", ["Global", "MoTE"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "qwen3_moe"])
def test_every_family(family: str, variant: str, data: Path) -> None:
    check_one_edit(tiny_model(family), hparams(data, variant), shrink=0.95)


@pytest.mark.parametrize("variant", ["Global", "MoTE"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_regularisation_the_residual_vanishes(family: str, variant: str, data: Path) -> None:
    """Also where the layer scales its block's output (GraniteMoE, 0.22)."""
    check_one_edit(tiny_model(family), plain_ridge(data, variant, lambda_reg=1e-9), shrink=1e-3)


def test_bcd_converges_to_global(data: Path) -> None:
    exact, few, many = tiny_model(), tiny_model(), tiny_model()
    edit(exact, plain_ridge(data, lambda_reg=1.0), requests(4))
    first = edit(few, plain_ridge(data, "MoEEdit-BCD", lambda_reg=1.0, num_passes=1), requests(4))
    edit(many, plain_ridge(data, "MoEEdit-BCD", lambda_reg=1.0, num_passes=60), requests(4))
    far, near = ((stacked(m, 2) - stacked(exact, 2)).norm() for m in (few, many))
    assert near < 1e-4 * (stacked(exact, 2) - stacked(tiny_model(), 2)).norm()
    assert far > 10 * near
    assert [len(r.objective) for r in first.solver_reports] == [2, 2]
    assert all(b <= a for r in first.solver_reports for a, b in zip(r.objective, r.objective[1:], strict=False))


def test_a_mote_basis_that_leaves_nothing_out_is_global(data: Path) -> None:
    ours, exact = tiny_model(), tiny_model()
    edit(ours, plain_ridge(data, "MoTE/residual"), requests(3))
    edit(exact, plain_ridge(data, "Global"), requests(3))
    torch.testing.assert_close(stacked(ours, 1), stacked(exact, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stacked(ours, 2), stacked(exact, 2), atol=1e-5, rtol=1e-5)


def test_ranks_restrict_mote(data: Path) -> None:
    model = tiny_model()
    edit(model, plain_ridge(data, "MoTE", rank_expert=2, rank_out=3, rank_in=4), requests(3))
    change = stacked(model, 2) - stacked(tiny_model(), 2)
    for mode, rank in ((0, 2), (1, 3), (2, 4)):
        singular = torch.linalg.svdvals(change.movedim(mode, 0).flatten(1))
        assert singular[rank] < 1e-5 * singular[0]
        assert singular[rank - 1] > 1e-5 * singular[0]


def moments_of(model: nn.Module, editor: Any) -> LayerMoments:
    """The statistics of layer 2, which preparing wrote to the cache and did not keep."""
    view = MoELayerView(model)
    return layer_statistics(view, TOK, editor.hparams, [2], model_fingerprint(view))[2]


def gains(prepared: Prepared) -> dict[int, float]:
    return {index: layer.tail.gain for index, layer in prepared.layers.items()}


def test_nullspace_protects_preserved_keys(data: Path) -> None:
    editor = make_editor(hparams(data, layers=[2]), progress=False)
    model = tiny_model()
    editor.edit(model, TOK, facts(3))
    change = stacked(model, 2) - stacked(tiny_model(), 2)
    free = tiny_model()
    edit(free, plain_ridge(data, layers=[2]), requests(3))
    unprotected = stacked(free, 2) - stacked(tiny_model(), 2)
    moments, space = moments_of(model, editor).keys.double(), editor.prepared.layers[2].metric
    for j in torch.nonzero(change.flatten(1).norm(dim=1)).flatten().tolist():
        assert 0 < space.ranks[j] < 24
        values, vectors = torch.linalg.eigh(moments[j])
        kept = vectors[:, values > 0.05 * values[-1]]
        assert (change[j] @ kept).norm() < 1e-5 * change[j].norm()
        assert (unprotected[j] @ kept).norm() > 0.1 * unprotected[j].norm()


def test_experts_may_be_frozen_for_lack_of_statistics(data: Path) -> None:
    editor = make_editor(hparams(data, layers=[2], low_coverage="frozen", min_coverage=60), progress=False)
    counts = editor.prepare(tiny_model(), TOK).layers[2].coverage
    frozen = counts < 60
    assert frozen.any()
    assert not frozen.all()
    model = tiny_model()
    editor.edit(model, TOK, facts(6))
    change = (stacked(model, 2) - stacked(tiny_model(), 2)).flatten(1).norm(dim=1)
    assert (change[frozen] == 0).all()
    assert change.sum() > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_edit_twice_gives_the_same_bits(variant: str, data: Path) -> None:
    first, second = tiny_model(), tiny_model()
    for model in (first, second):
        torch.manual_seed(int(model is second))
        edit(model, hparams(data, variant), requests(2))
    assert_same_state(state_of(first), state_of(second))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ["Global", "MoTE", "MoE-MEMIT"])
def test_half_precision_models(variant: str, dtype: torch.dtype, data: Path) -> None:
    model = tiny_model(dtype=dtype)
    before = state_of(model)
    h = fact_output(model, 2, requests(3))
    result = edit(model, hparams(data, variant), requests(3))
    wanted = h + result.targets[0].delta
    assert ((wanted - fact_output(model, 2, requests(3))).norm(dim=1) < (wanted - h).norm(dim=1)).all()
    assert all(0 < r.rounding_loss < 0.5 for r in result.patch.reports)
    result.patch.revert(model)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("variant", ["MoTE", "MoEEdit-BCD", "Global"])
def test_a_saved_edit_can_be_applied_elsewhere(variant: str, data: Path, tmp_path: Path) -> None:
    model, other = tiny_model(dtype=torch.bfloat16), tiny_model(dtype=torch.bfloat16)
    patch = edit(model, hparams(data, variant), requests(2)).patch
    patch.save(tmp_path / "p.safetensors")
    loaded = WeightPatch.load(tmp_path / "p.safetensors")
    loaded.apply(other)
    assert_same_state(state_of(model), state_of(other))
    assert loaded.metadata["hparams"] == hparams(data, variant).to_dict()
    assert [r["prompt"] for r in loaded.metadata["requests"]] == [r["prompt"] for r in requests(2)]


# ---------------------------------------------------------------- spread and solve against plain formulas


def test_residual_spread_by_hand(data: Path) -> None:
    hp = plain_ridge(data, layers=[0, 1, 2])
    model, manual, facts = tiny_model(), tiny_model(), requests(3)
    result = edit(model, hp, facts)
    wanted = fact_output(manual, 2, facts) + result.targets[0].delta
    for left, layer in ((3, 0), (2, 1), (1, 2)):
        keys, output = captured(manual, hp, layer, facts)
        add(manual, layer, dense_ridge(keys, (wanted - output) / left, hp.lambda_reg))
    check_equal(model, manual, [0, 1, 2])


@pytest.mark.parametrize("prefixes", [[], ["A quiet harbour. ", "The fox: "]], ids=["bare", "prefixes"])
def test_update_spread_by_hand(prefixes: list[str], data: Path) -> None:
    hp = plain_ridge(data, "Global+speedup", layers=[0, 1, 2], context_prefixes=prefixes)
    model, manual, facts = tiny_model(), tiny_model(), requests(3)
    result = edit(model, hp, facts)
    keys, _ = captured(manual, hp, 2, facts)
    per_fact = len(prefixes) + 1
    assert keys.num_tokens == 3 * per_fact
    # The mean over a fact's contexts: the penalty counts per_fact times as much against their sum.
    solution = dense_ridge(keys, result.targets[0].delta.repeat_interleave(per_fact, 0), hp.lambda_reg * per_fact)
    for left, layer in ((3, 0), (2, 1), (1, 2)):
        add(manual, layer, solution / left)
    check_equal(model, manual, [0, 1, 2])


def test_residual_spread_with_prefixes_by_hand(data: Path) -> None:
    hp = plain_ridge(data, context_prefixes=["A quiet harbour. ", "The fox: "])
    model, manual, facts = tiny_model(), tiny_model(), requests(2)
    result = edit(model, hp, facts)
    wanted = captured(manual, hp, 2, facts)[1] + result.targets[0].delta.repeat_interleave(3, 0)
    for left, layer in ((2, 1), (1, 2)):
        keys, output = captured(manual, hp, layer, facts)
        add(manual, layer, dense_ridge(keys, (wanted - output) / left, 3 * hp.lambda_reg))
    check_equal(model, manual, [1, 2])


def test_mote_spreads_its_core_by_each_layers_own_factors(data: Path) -> None:
    hp = hparams(data, "MoTE", spread="update", rank_expert=4, rank_out=16, rank_in=12)
    model, manual, facts = tiny_model(), tiny_model(), requests(3)
    editor = make_editor(hp, progress=False)
    result = editor.edit(model, TOK, parse_requests(facts))
    bases = {i: layer.basis for i, layer in editor.prepared.layers.items()}
    metrics = {i: layer.metric for i, layer in editor.prepared.layers.items()}
    keys, _ = captured(manual, hp, 2, facts)
    core = solve_core(keys, result.targets[0].delta, hp.lambda_reg, metrics[2], bases[2])
    for left, layer in ((2, 1), (1, 2)):
        add(manual, layer, expand_core(core, bases[layer], metrics[layer]).dense(8) / left)
    check_equal(model, manual, [1, 2])


def test_bcd_visits_all_experts_in_the_published_order(data: Path) -> None:
    """``randperm`` over all E experts, whichever of them these facts reach."""
    hp = plain_ridge(data, "BCD+speedup", layers=[2], num_passes=1, lambda_reg=1.0)
    fact = next(f for f in requests(6) if int(captured(tiny_model(), hp, 2, [f])[0].expert.max()) < 7)
    model, manual = tiny_model(), tiny_model()
    editor = make_editor(hp, progress=False)
    result = editor.edit(model, TOK, parse_requests([fact]))
    keys, _ = captured(manual, hp, 2, [fact])
    delta, metric = result.targets[0].delta, editor.prepared.layers[2].metric
    update, _ = solve_bcd(keys, delta, 1.0, metric, expert_orders(8, 1, 42))
    add(manual, 2, update.dense(8))
    check_equal(model, manual, [2])
    every = [solve_bcd(keys, delta, 1.0, metric, expert_orders(n, 1, 42))[0].dense(8) for n in range(5, 9)]
    assert any((e - every[-1]).norm() > 1e-3 * every[-1].norm() for e in every)


def test_granitemoe_residuals_are_divided_by_its_multiplier(data: Path) -> None:
    editor = make_editor(plain_ridge(data), progress=False)
    assert gains(editor.prepare(tiny_model("granitemoe"), TOK)) == pytest.approx({1: 0.22, 2: 0.22}, rel=1e-3)
    assert gains(editor.prepare(tiny_model(), TOK)) == {1: 1.0, 2: 1.0}


# ---------------------------------------------------------------- MoE-ROME


def test_rome_edits_one_fact_at_a_time(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, plain = [], GlobalEditor.solve

    def counting(self: Editor, keys: Any, *args: Any) -> Any:
        sizes.append(keys.num_tokens)
        return plain(self, keys, *args)

    monkeypatch.setattr(GlobalEditor, "solve", counting)
    hp = hparams(data, "MoE-ROME")
    together, singly = tiny_model(), tiny_model()
    before = state_of(together)
    result = edit(together, hp, requests(3))
    assert sizes == [1, 1, 1]
    assert [len(t.delta) for t in result.targets] == [1, 1, 1]
    editor = make_editor(hp, progress=False)
    for fact in requests(3):
        editor.edit(singly, TOK, parse_requests([fact]))
    assert_same_state(state_of(together), state_of(singly))
    result.patch.revert(together)
    assert_same_state(before, state_of(together))


def test_rome_reaches_its_target_as_lambda_vanishes(data: Path) -> None:
    check_one_edit(tiny_model(), hparams(data, "MoE-ROME", lambda_reg=1e-9), shrink=1e-3)


# ---------------------------------------------------------------- memory of earlier edits


@pytest.mark.parametrize("variant", ["Global", "MoTE", "MoEEdit-BCD", "MoE-MEMIT"])
def test_remembered_edits_are_kept(variant: str, data: Path) -> None:
    facts, drift, kept = requests(6), {}, {}
    for remember in (False, True):
        hp = hparams(data, variant, layers=[2], remember_edits=remember, lambda_reg=1e-3)
        model, editor = tiny_model(), make_editor(hp, progress=False)
        first = editor.edit(model, TOK, parse_requests(facts[:3]))
        assert bool(first.memory.keys) == remember
        keys, outputs = captured(model, hp, 2, facts[:3])
        second = editor.edit(model, TOK, parse_requests(facts[3:]), first.memory)
        drift[remember] = float((fact_output(model, 2, facts[:3]) - outputs).norm())
        kept[remember] = float(second.patch.steps[0][1].apply(keys).norm())
        assert [k.num_tokens for k in second.memory.keys.get(2, [])] == ([3, 3] if remember else [])
        wanted = captured(tiny_model(), hp, 2, facts[3:])[1] + second.targets[0].delta
        now = fact_output(model, 2, facts[3:])
        assert (wanted - now).norm() < second.targets[0].delta.norm()
    assert drift[True] < 0.5 * drift[False]
    assert kept[True] < 0.5 * kept[False]


def test_alphaedit_remembers_and_memory_is_a_value(data: Path) -> None:
    hp = hparams(data, "MoE-AlphaEdit")
    model, editor = tiny_model(), make_editor(hp, progress=False)
    first = editor.edit(model, TOK, facts(2))
    snapshot = {layer: list(parts) for layer, parts in first.memory.keys.items()}
    assert {layer: [k.num_tokens for k in parts] for layer, parts in snapshot.items()} == {1: [2], 2: [2]}
    second = editor.edit(model, TOK, facts(4)[2:], first.memory)
    assert first.memory.keys == snapshot
    assert {layer: len(parts) for layer, parts in second.memory.keys.items()} == {1: 2, 2: 2}
    assert EditMemory().keys == {}


def test_rome_can_remember_within_a_batch(data: Path) -> None:
    result = edit(tiny_model(), hparams(data, "MoE-ROME", remember_edits=True), requests(3))
    assert [k.num_tokens for k in result.memory.keys[2]] == [1, 1, 1]


# ---------------------------------------------------------------- failure leaves nothing behind


class Trouble(Exception):
    pass


@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist"])
def test_an_error_at_the_second_layer(
    family: str, error: type[BaseException], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain, calls = tiny_model(family).train(), GlobalEditor.solve, []
    before = state_of(model)

    def second_fails(self: Editor, *args: Any) -> Any:
        calls.append(changed_parameters(before, model))
        if len(calls) == 2:
            raise error
        return plain(self, *args)

    monkeypatch.setattr(GlobalEditor, "solve", second_fails)
    with pytest.raises(error):
        edit(model, hparams(data), requests(3))
    assert not calls[0]
    assert calls[1], "the first layer was already written"
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize(
    "function", ["found_targets", "capture_facts", "fact_contexts", "check_keys", "model_fingerprint"]
)
def test_an_error_anywhere(function: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model().train()
    before = state_of(model)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise Trouble

    monkeypatch.setattr(solving, function, fail)
    with pytest.raises(Trouble):
        edit(model, hparams(data), requests(3))
    assert_same_state(before, state_of(model))


def test_a_solution_that_is_not_finite(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain, calls = tiny_model(), GlobalEditor.place, []
    before = state_of(model)

    def poison(self: Editor, solution: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            solution.left[0, 0] = float("nan")
        return plain(self, solution, *args)

    monkeypatch.setattr(GlobalEditor, "place", poison)
    with pytest.raises(NumericalError, match="layer 2 holds NaN"):
        edit(model, hparams(data), requests(3))
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("variant", ["Global", "MoTE", "MoEEdit-BCD", "MoE-MEMIT"])
@pytest.mark.parametrize(
    "where",
    [
        "layers.1.mlp.experts.down_proj",
        "layers.1.mlp.experts.gate_up_proj",
        "layers.3.mlp.gate.weight",
        "embed_tokens.weight",
    ],
)
def test_weights_that_are_not_finite(where: str, variant: str, data: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        parameter = model.model.get_parameter(where)
        parameter[-1] = float("inf")
        if where == "embed_tokens.weight":
            parameter.fill_(float("inf"))
    before = state_of(model)
    with pytest.raises(NumericalError):
        edit(model, hparams(data, variant), requests(3))
    assert_same_state(before, state_of(model))


def test_a_singular_system(data: Path) -> None:
    model = tiny_model()
    before = state_of(model)
    facts = requests(1)
    facts.append(facts[0] | {"prompt": facts[0]["prompt"] + " mostly"})
    with pytest.raises(NumericalError, match=r"singular at lambda_reg 0\.0"):
        edit(model, plain_ridge(data, lambda_reg=0.0), facts)
    assert_same_state(before, state_of(model))


def test_unusable_requests_change_nothing(data: Path) -> None:
    model = tiny_model()
    before = state_of(model)
    for given in ([], requests(1) * 2, [requests(1)[0] | {"subject": "Peru"}]):
        with pytest.raises(RequestError):
            edit(model, hparams(data), given)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("rank", [{"rank_in": 25}, {"rank_out": 33}, {"rank_expert": 9}])
def test_ranks_beyond_the_size_of_their_mode(rank: dict[str, int], data: Path) -> None:
    model = tiny_model()
    before = state_of(model)
    (name,) = rank
    with pytest.raises(HyperParamsError, match=rf"{name} must lie in 1\.\.\d+, the size of that mode"):
        edit(model, hparams(data, "MoTE", **rank), requests(1))
    assert_same_state(before, state_of(model))


def test_missing_corpus(data: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        edit(tiny_model(), hparams(data, mom2_dataset="nowhere.txt"), requests(1))


# ---------------------------------------------------------------- state of the model


@pytest.mark.parametrize("variant", ["Global", "MoTE", "BCD+speedup"])
def test_modes_flags_and_forwards_stay(variant: str, data: Path) -> None:
    model, evaluating = tiny_model().train(), tiny_model()
    model.model.layers[3].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.layers[0].forward = model.model.layers[0].forward
    before = state_of(model)
    edit(model, hparams(data, variant), requests(2))
    after = state_of(model)
    for part in ("requires_grad", "grad", "training", "hooks", "forward"):
        assert before[part] == after[part], part
    assert model.training
    assert not model.model.layers[3].training
    edit(evaluating, hparams(data, variant), requests(2))
    assert all(torch.equal(p, after["parameters"][n]) for n, p in evaluating.named_parameters())


# ---------------------------------------------------------------- what is prepared once


def test_later_batches_reuse_what_was_prepared(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, editor, calls = tiny_model(), make_editor(hparams(data, "MoTE"), progress=False), []
    plain = solving.layer_statistics
    monkeypatch.setattr(solving, "layer_statistics", lambda *a: calls.append(1) or plain(*a))
    first = editor.edit(model, TOK, facts(2))
    prepared = editor.prepared
    second = editor.edit(model, TOK, facts(4)[2:])
    assert editor.prepared is prepared
    assert len(calls) == 1
    assert set(first.seconds) == {"statistics", "targets", "solve", "write", "diagnose", "evaluate"}
    assert all(first.seconds[s] > 0 for s in ("statistics", "targets", "solve", "write"))
    assert second.seconds["statistics"] < first.seconds["statistics"]
    assert first.patch.fingerprint == second.patch.fingerprint == prepared.fingerprint


def test_another_model_is_prepared_anew(data: Path) -> None:
    editor = make_editor(hparams(data), progress=False)
    editor.edit(tiny_model(), TOK, facts(2))
    one = editor.prepared.fingerprint
    other = tiny_model(seed=1)
    patch = editor.edit(other, TOK, facts(2)).patch
    assert patch.fingerprint == editor.prepared.fingerprint != one
    fresh = tiny_model(seed=1)
    edit(fresh, hparams(data), requests(2))
    assert_same_state(state_of(other), state_of(fresh))
    smaller = tiny_model("gpt_oss")
    editor.edit(smaller, TOK, facts(2)).patch.revert(smaller)
    assert_same_state(state_of(tiny_model("gpt_oss")), state_of(smaller))


def test_prepared_values_can_be_handed_on(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hp = hparams(data)
    prepared = make_editor(hp, progress=False).prepare(tiny_model(), TOK)
    assert {i: layer.num_experts for i, layer in prepared.layers.items()} == {1: 8, 2: 8}
    monkeypatch.setattr(solving, "layer_statistics", None)
    model, plain = tiny_model(), tiny_model()
    GlobalEditor(hp, prepared, progress=False).edit(model, TOK, facts(2))
    monkeypatch.undo()
    edit(plain, hp, requests(2))
    assert_same_state(state_of(model), state_of(plain))


def test_statistics_warn_about_thin_coverage(data: Path) -> None:
    with pytest.warns(CoverageWarning, match="Layer 1"):
        edit(tiny_model(), hparams(data, mom2_n_samples=1), requests(1))


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize("layers", [[1, 4], [9], [3, 4, 5]])
def test_layers_out_of_range(layers: list[int], data: Path) -> None:
    model = tiny_model()
    before = state_of(model)
    with pytest.raises(LayerError, match="out of range: the model has layers 0 to 3"):
        edit(model, hparams(data, layers=layers), requests(1))
    assert_same_state(before, state_of(model))


def test_dense_layers(data: Path) -> None:
    with pytest.raises(LayerError, match=r"layers \[0\] are dense; the MoE layers of this model are \[1, 2, 3\]"):
        edit(tiny_model("deepseek_v3"), hparams(data, layers=[0, 1]), requests(1))


def test_dense_model(data: Path) -> None:
    import transformers as hf

    config = hf.Qwen3Config(vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                            num_key_value_heads=2, head_dim=8, intermediate_size=48)  # fmt: skip
    with pytest.raises(DenseModelError):
        edit(hf.Qwen3ForCausalLM(config), hparams(data), requests(1))


def test_loss_layer_is_the_last_one(data: Path) -> None:
    with pytest.raises(LayerError, match=r"v_loss_layer must be the last layer \(3\) or None.*found 2"):
        edit(tiny_model(), hparams(data, v_loss_layer=2), requests(1))
    named, plain = tiny_model(), tiny_model()
    edit(named, hparams(data, v_loss_layer=3), requests(1))
    edit(plain, hparams(data), requests(1))
    assert_same_state(state_of(named), state_of(plain))


# ---------------------------------------------------------------- EasyEdit's interface


@pytest.mark.parametrize("method", METHODS)
def test_apply_to_model_as_easyedit_calls_it(method: str, data: Path) -> None:
    apply, hp = APPLY[method], hparams(data, method)
    names = list(inspect.signature(apply).parameters)
    assert names[:7] == ["model", "tok", "requests", "hparams", "copy", "return_orig_weights", "keep_original_weight"]
    model = tiny_model()
    before = state_of(model)
    request = requests(1)[0] | {"portability": {}, "locality": {}, "rephrase_prompt": None}
    returned, weights = apply(
        model, TOK, [request], hp, copy=False, return_orig_weights=True, keep_original_weight=False, train_ds=None
    )
    assert returned is model
    assert set(weights) == down_projections(model, hp.layers)
    assert changed_parameters(before, model) == set(weights)
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, original in weights.items():
            assert original.shape == parameters[name].shape
            parameters[name][...] = original
    assert_same_state(before, state_of(model))
    direct = tiny_model()
    patch = edit(direct, hp, [request]).patch
    assert patch.metadata["hparams"]["alg_name"] == method


def test_apply_on_a_copy(data: Path) -> None:
    model = tiny_model()
    before = state_of(model)
    edited, weights = editors.apply_global_to_model(model, TOK, requests(2), hparams(data), copy=True)
    assert weights == {}
    assert edited is not model
    assert_same_state(before, state_of(model))
    assert changed_parameters(before, edited) == down_projections(model, [1, 2])
    in_place = tiny_model()
    editors.apply_global_to_model(in_place, TOK, requests(2), hparams(data))
    assert_same_state(state_of(in_place), state_of(edited))
    edited, weights = editors.apply_global_to_model(
        model, TOK, requests(2), hparams(data), copy=True, return_orig_weights=True
    )
    assert all(torch.equal(w, before["parameters"][n]) for n, w in weights.items())


def test_originals_are_returned_when_asked_for(data: Path) -> None:
    asked = [{}, {"keep_original_weight": True}, {"return_orig_weights": True}]
    sizes = [len(editors.apply_global_to_model(tiny_model(), TOK, requests(1), hparams(data), **a)[1]) for a in asked]
    assert sizes == [0, 2, 2]


def test_public_names_are_the_same_functions() -> None:
    for method, apply in APPLY.items():
        name = next(n for n in editors.__all__ if getattr(editors, n) is apply or getattr(editors, n) == apply)
        assert getattr(easyedit_moe, name) == apply, method


# ---------------------------------------------------------------- registry


def test_registry_knows_every_method() -> None:
    assert set(method_names()) == set(presets.METHODS)
    assert set(method_names()) >= set(METHODS)
    for method, cls in METHODS.items():
        assert editor_class(method) is cls
        assert cls.method == method
        assert method in hyperparams_class(method).methods
    assert editor_class("MoEEdit") is MoEEditEditor


def test_registry_refuses_duplicates_and_unknown_names() -> None:
    row = presets.find_method("Global")
    presets.register_method(row)
    with pytest.raises(MethodError, match=r"'Global' is already taken, by easyedit_moe\.editors\.global_:GlobalEditor"):
        presets.register_method(replace(row, editor="elsewhere:Editor"))
    with pytest.raises(MethodError, match="'MoEEdit' is already taken"):
        presets.register_method(replace(row, name="MoEEdit"))
    with pytest.raises(MethodError, match=r"Unknown method 'MoTE2'\. Did you mean 'MoTE'\?"):
        editor_class("MoTE2")
    with pytest.raises(MethodError, match=r"Did you mean 'MoE-AlphaEdit'\?"):
        editor_class("MoEAlphaEdit")
    with pytest.raises(MethodError, match="nowhere:Editor, which can't be imported"):
        presets.located("nowhere:Editor")
    assert set(method_names()) == set(presets.METHODS)


def test_hparams_of_another_method(data: Path) -> None:
    with pytest.raises(
        HyperParamsError, match="MoTE needs MoTEHyperParams with alg_name 'MoTE'; found GlobalHyperParams"
    ):
        MoTEEditor(hparams(data, "Global"))
    with pytest.raises(
        HyperParamsError, match=r"Global needs .* found GlobalHyperParams with alg_name 'Global\+speedup'"
    ):
        GlobalEditor(hparams(data, "Global+speedup"))
    with pytest.raises(HyperParamsError, match="found dict with alg_name None"):
        GlobalEditor({"alg_name": "Global"})
    model = tiny_model()
    before = state_of(model)
    with pytest.raises(HyperParamsError, match="MoEEdit-BCD needs MoEEditHyperParams"):
        editors.apply_moeedit_to_model(model, TOK, requests(1), hparams(data, "MoTE"))
    assert_same_state(before, state_of(model))


# ---------------------------------------------------------------- GPUs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("variant", VARIANTS)
def test_on_a_gpu_with_collected_and_with_cached_statistics(variant: str, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    for _ in range(2):
        model = tiny_model().cuda()
        before = state_of(model)
        edit(model, hparams(tmp_path, variant), requests(2)).patch.revert(model)
        assert_same_state(before, state_of(model))
