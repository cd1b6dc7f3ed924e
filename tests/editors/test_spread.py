"""Every value of ``spread`` against plain formulas on dense float64 systems, and what holds for all of them."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from solving_editors import (
    TOK,
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
from tiny import facts, requests, state_of, tiny_model
from torch import Tensor, nn

from easyedit_moe.algebra.tucker import TuckerBasis
from easyedit_moe.editors import EditMemory, make_editor, mote
from easyedit_moe.errors import HyperParamsError
from easyedit_moe.moe import capture

pytestmark = pytest.mark.usefixtures("no_editing_warnings")


def change(model: nn.Module, layer: int) -> Tensor:
    return stacked(model, layer) - stacked(tiny_model(), layer)


# ---------------------------------------------------------------- last


@pytest.mark.parametrize("variant", ["Global", "MoTE", "MoEEdit-BCD", "MoE-MEMIT"])
def test_last_is_an_edit_of_the_last_layer_alone(variant: str, data: Path) -> None:
    """Bit-equal to the same edit with no other layer named, and prepares nothing else."""
    model, single = tiny_model(), tiny_model()
    editor = make_editor(hparams(data, variant, layers=[0, 1, 2], spread="last"), progress=False)
    result = editor.edit(model, TOK, facts(3))
    edit(single, hparams(data, variant, layers=[2]), requests(3))
    assert torch.equal(stacked(model, 2), stacked(single, 2))
    assert changed_parameters(state_of(tiny_model()), model) <= down_projections(model, [2])
    assert list(editor.prepared.layers) == result.patch.layers == [2]
    assert [layer.layer for layer in result.diagnosis.layers] == [2]


# ---------------------------------------------------------------- once


@pytest.mark.parametrize("prefixes", [[], ["A quiet harbour. ", "The fox: "]], ids=["bare", "prefixes"])
@pytest.mark.parametrize(
    ("rounds", "shares"), [(1, []), (2, []), (3, [0.25, 0.5, 0.25]), (1, [0.0, 1.0, 0.5])], ids=str
)
def test_once_by_hand(rounds: int, shares: list[float], prefixes: list[str], data: Path) -> None:
    hp = plain_ridge(data, layers=[0, 1, 2], spread="once", rounds=rounds, shares=shares, context_prefixes=prefixes)
    model, manual, per_fact = tiny_model(), tiny_model(), len(prefixes) + 1
    result = edit(model, hp, requests(3))
    wanted = captured(manual, hp, 2, requests(3))[1] + result.targets[0].delta.repeat_interleave(per_fact, 0)
    for left in range(rounds, 0, -1):
        states = {layer: captured(manual, hp, layer, requests(3)) for layer in hp.layers}
        for layer, share in zip(hp.layers, shares or [1 / 3, 1 / 2, 1], strict=True):
            keys, output = states[layer]
            add(manual, layer, dense_ridge(keys, (wanted - output) * share / left, hp.lambda_reg * per_fact))
    written = [layer for layer, share in zip(hp.layers, shares or [1, 1, 1], strict=True) if share]
    check_equal(model, manual, written)
    assert result.patch.layers == written
    assert [step[0] for step in result.patch.steps] == written * rounds


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("variant", ["Global", "MoTE"])
def test_all_keys_of_a_round_come_from_one_forward(
    variant: str, rounds: int, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, plain = [], capture._capture_batch

    def counting(view: Any, batch: Any, where: Any, key_layers: Any, output_layers: Any) -> Any:
        asked.append(list(key_layers))
        return plain(view, batch, where, key_layers, output_layers)

    editor = make_editor(hparams(data, variant, layers=[0, 1, 2], spread="once", rounds=rounds), progress=False)
    editor.prepare(tiny_model(), TOK)
    monkeypatch.setattr(capture, "_capture_batch", counting)
    editor.edit(tiny_model(), TOK, facts(3))
    assert asked == [[0, 1, 2]] * rounds + [[]]


def test_rounds_come_nearer_to_the_target(data: Path) -> None:
    shares = []
    for rounds in (1, 2, 4):
        hp = plain_ridge(data, layers=[0, 1, 2], spread="once", rounds=rounds, lambda_reg=1e-3)
        result = edit(tiny_model(), hp, requests(4))
        shares.append(sum(abs(1 - fact.residual_share) for fact in result.diagnosis.facts))
    assert shares[2] < shares[1] < shares[0]


@pytest.mark.parametrize("variant", ["Global", "MoTE", "MoEEdit-BCD", "MoE-MEMIT", "MoE-AlphaEdit"])
def test_one_layer_makes_once_residual_and_last_the_same(variant: str, data: Path) -> None:
    found = []
    for spread in ("residual", "once", "last"):
        model = tiny_model()
        edit(model, hparams(data, variant, layers=[2], spread=spread), requests(3))
        found.append(stacked(model, 2))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_rounds_remember_each_edit_once(data: Path) -> None:
    hp = hparams(data, "Global", spread="once", rounds=3, remember_edits=True)
    model, editor = tiny_model(), make_editor(hp, progress=False)
    first = editor.edit(model, TOK, facts(3))
    assert {layer: [k.num_tokens for k in keys] for layer, keys in first.memory.keys.items()} == {1: [3], 2: [3]}
    second = editor.edit(model, TOK, facts(6)[3:], first.memory)
    assert (first.memory.edits, second.memory.edits, EditMemory().edits) == (3, 6, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 2}, "rounds must be left out unless spread is once"),
        ({"spread": "update", "shares": [1.0, 1.0]}, "shares must be left out unless spread is once"),
        ({"spread": "once", "rounds": 0}, "rounds must be at least 1"),
        ({"spread": "once", "shares": [1.0]}, "shares must be one number >= 0 for each of the 2 layers"),
        ({"spread": "once", "shares": [0.0, 0.0]}, "not all 0"),
        ({"spread": "once", "shares": [-1.0, 1.0]}, "not all 0"),
        ({"spread": "once", "shares": [float("nan"), 1.0]}, "not all 0|finite"),
    ],
    ids=str,
)
def test_what_spread_does_not_use_is_refused(changes: dict[str, Any], message: str, data: Path) -> None:
    with pytest.raises(HyperParamsError, match=message):
        hparams(data, "MoTE", **changes)


# ---------------------------------------------------------------- update, in a gauge of its own


@pytest.mark.parametrize("turn", ["signs", "rotations"])
@pytest.mark.parametrize("whitening", ["none", "in"])
def test_signs_and_rotations_of_all_factors_leave_an_edit_alone(
    turn: str, whitening: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"spread": "update", "whitening": whitening, "rank_expert": 5, "rank_out": 16, "rank_in": 12}
    plain, turned = tiny_model(), tiny_model()
    edit(plain, hparams(data, "MoTE", **settings), requests(3))
    draw, original = torch.Generator().manual_seed(5), mote.layer_basis

    def another(*args: Any) -> TuckerBasis:
        basis = original(*args)
        found = {}
        for name in ("u_expert", "u_out", "u_in"):
            factor = getattr(basis, name)
            q = torch.linalg.qr(torch.randn(factor.shape[1], factor.shape[1], generator=draw, dtype=torch.float64)).Q
            found[name] = factor.double() @ (torch.diag(torch.diagonal(q).sign()) if turn == "signs" else q)
        return replace(basis, **found)

    monkeypatch.setattr(mote, "layer_basis", another)
    edit(turned, hparams(data, "MoTE", **settings), requests(3))
    for layer in (1, 2):
        a, b = change(plain, layer).flatten(), change(turned, layer).flatten()
        assert float(a @ b / (a.norm() * b.norm())) > 1 - 1e-5


# ---------------------------------------------------------------- MoEEdit's published code


def test_the_published_codes_residual_and_ridge_by_hand(data: Path) -> None:
    """The last layer's target less each layer's own output, and a ridge that grows with earlier edits."""
    hp = plain_ridge(data, "MoEEdit-BCD", layers=[0, 1, 2], variant="code", num_passes=200, lambda_reg=0.5)
    model, manual, editor = tiny_model(), tiny_model(), make_editor(hp, progress=False)
    first = editor.edit(model, TOK, facts(2))
    second = editor.edit(model, TOK, facts(4)[2:], first.memory.extended([], 398))
    for chosen, result, ridge in ((requests(2), first, 0.5), (requests(4)[2:], second, 0.7)):
        wanted = captured(manual, hp, 2, chosen)[1] + result.targets[0].delta
        for left, layer in ((3, 0), (2, 1), (1, 2)):
            at_layer = replace(hp, layers=[layer])
            keys, own = captured(manual, at_layer, layer, chosen)
            add(manual, layer, dense_ridge(keys, (wanted - own) / sqrt(left), ridge))
    check_equal(model, manual, [0, 1, 2])
    assert (first.memory.edits, second.memory.edits) == (2, 402)
    assert first.memory.keys == {}


def test_the_variant_is_a_choice_of_residual_spread(data: Path) -> None:
    paper, code, plain = tiny_model(), tiny_model(), tiny_model()
    edit(plain, hparams(data, "MoEEdit-BCD"), requests(3))
    edit(paper, hparams(data, "MoEEdit-BCD", variant="paper"), requests(3))
    edit(code, hparams(data, "MoEEdit-BCD", variant="code"), requests(3))
    assert torch.equal(stacked(plain, 1), stacked(paper, 1))
    assert (change(code, 1) - change(paper, 1)).norm() > 0.1 * change(paper, 1).norm()
    for changes in ({"spread": "once"}, {"spread": "last"}):
        with pytest.raises(HyperParamsError, match="variant must be paper unless spread is residual"):
            hparams(data, "MoEEdit-BCD", variant="code", **changes)
    with pytest.raises(HyperParamsError, match="variant must be one of paper, code"):
        hparams(data, "MoEEdit-BCD", variant="published")


def test_loops_over_apply_count_their_edits(data: Path) -> None:
    """EasyEdit's calls hand nothing on, and the published code's ridge needs the number of earlier edits."""
    hp = hparams(data, "MoEEdit-BCD", variant="code", lambda_reg=50.0)
    model, editor = tiny_model(), make_editor(hp, progress=False)
    for chosen in (requests(3), requests(6)[3:]):
        type(editor).apply_to_model(model, TOK, chosen, hp)
    by_hand, memory = tiny_model(), None
    for chosen in (facts(3), facts(6)[3:]):
        memory = editor.edit(by_hand, TOK, chosen, memory).memory
    assert torch.equal(stacked(model, 2), stacked(by_hand, 2))


# ---------------------------------------------------------------- ranks by energy: each layer has its own


@pytest.mark.parametrize("spread", ["update", "residual", "once", "last"])
def test_layers_of_different_ranks(spread: str, data: Path) -> None:
    hp = hparams(data, "MoTE", spread=spread, tucker_energy=[0.8, 0.75, 0.7])
    model, editor = tiny_model(), make_editor(hp, progress=False)
    with torch.no_grad():  # another spectrum, so that another number of directions holds as much
        model.model.layers[1].mlp.experts.down_proj *= torch.logspace(0, -1.5, 24)
    before = {layer: stacked(model, layer) for layer in (1, 2)}
    result = editor.edit(model, TOK, facts(3))
    bases = {layer: prepared.basis for layer, prepared in editor.prepared.layers.items()}
    if spread in ("residual", "once"):
        assert bases[1].u_in.shape[1] < bases[2].u_in.shape[1]
    for layer in editor.prepared.layers:
        moved = stacked(model, layer) - before[layer]
        assert 0 < moved.norm() < float("inf")
        singular = torch.linalg.svdvals(moved.movedim(1, 0).flatten(1))
        rank = torch.linalg.matrix_rank(bases[layer].u_out)
        assert singular[rank:].sum() < 1e-4 * singular[0]
    result.patch.revert(model)
    assert torch.equal(stacked(model, 1), before[1])


def test_ranks_are_given_in_one_way(data: Path) -> None:
    plain = hparams(data, "MoTE")
    assert (plain.rank_expert, plain.rank_out, plain.rank_in) == (1.0, 1.0, 0.5)
    energy = hparams(data, "MoTE", tucker_energy=[0.9, 1.0, 0.5])
    assert (energy.rank_expert, energy.ranks(8, 32, 24)) == (None, None)
    assert type(energy).from_dict(energy.to_dict()) == energy
    with pytest.raises(HyperParamsError, match="rank_in must be left out, or null, where tucker_energy"):
        hparams(data, "MoTE", tucker_energy=[0.9, 0.9, 0.9], rank_in=4)
    for shares in ([0.9], [0.9, 0.0, 0.5], [0.9, 1.1, 0.5]):
        with pytest.raises(HyperParamsError, match="tucker_energy must be empty, or three shares"):
            hparams(data, "MoTE", tucker_energy=shares)
